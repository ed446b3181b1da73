"""Activation policies: the tensors that a layer's forward saves for its backward.

    policy     saves                                          backward
    recompute  the layer's input                              runs the layer's forward again first
    keep       all that backward reads, on the device         reads it
    offload    the same, in host memory (store/activations)   reads it once it is copied back

Legend: N tokens, C hidden width, D width of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fttrain.model.decoder import Layer
from fttrain.store import Traffic
from fttrain.store.activations import HostActivations, OffloadedPass
from fttrain.store.layer_inputs import DeviceLayerInputs, LayerInputs

Rotary = tuple[Tensor, Tensor]  # cos and sin (N, D)


class Policy(ABC):
    """Forward and backward of one layer for one micro-batch. ``layer`` is bound to its frozen
    bytes, the micro-batch's document lengths and its dropout.
    """

    @abstractmethod
    def forward(self, layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Any]:
        """``hidden`` (N, C) -> the layer's output (N, C), and the saved state for ``backward``."""

    def prefetch(self, saved: Any) -> None:  # noqa: B027
        """Start bringing what ``backward`` of ``saved`` reads to the device: it comes next."""

    @abstractmethod
    def backward(self, layer: Layer, saved: Any, grad: Tensor, rotary: Rotary) -> Tensor:
        """``grad`` of the output (N, C) -> that of the input (N, C). Adds to the adapters'
        gradient.
        """

    def discard(self) -> None:  # noqa: B027
        """Free all that is saved: its backward will not come."""

    def resize(self, pieces: int) -> None:  # noqa: B027
        """Divide the memory for saved tensors: micro-batches have 1 / ``pieces`` of the rows from
        here on, and are as many times more. Nothing may be saved at the time.
        """

    def take_traffic(self) -> Traffic:
        """The policy's traffic since the last call."""
        return Traffic()


Policies = Sequence[Policy]  # by layer of the decoder


class Recompute(Policy):
    """Save the layer's input alone, in ``inputs``."""

    def __init__(self, inputs: LayerInputs | None = None) -> None:
        self._inputs = inputs or DeviceLayerInputs()

    def forward(self, layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Any]:
        with torch.no_grad():
            output = layer(hidden, rotary)
        return output, self._inputs.save(hidden)

    def prefetch(self, saved: Any) -> None:
        self._inputs.prefetch(saved)

    def backward(self, layer: Layer, saved: Any, grad: Tensor, rotary: Rotary) -> Tensor:
        hidden = self._inputs.load(saved)  # (N, C)
        layer.state.recomputing = True
        try:
            output, input_grads = _with_graph(layer, hidden, rotary)
        finally:  # memory may run out, and the layer is used again
            layer.state.recomputing = False
        edge = get_gradient_edge(output)
        del output  # (N, C) that nothing reads; the edge alone keeps the graph alive
        return _through(edge, grad, input_grads)

    def discard(self) -> None:
        self._inputs.discard()

    def resize(self, pieces: int) -> None:
        self._inputs.resize(pieces)


class Keep(Policy):
    """Keep the layer's autograd graph and all tensors that it saved."""

    def forward(self, layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Any]:
        output, input_grads = _with_graph(layer, hidden, rotary)
        # The edge keeps the graph alive without the output (N, C).
        return output.detach(), (get_gradient_edge(output), input_grads)

    def backward(self, layer: Layer, saved: Any, grad: Tensor, rotary: Rotary) -> Tensor:
        edge, input_grads = saved
        return _through(edge, grad, input_grads)


class Offload(Policy):
    """Keep the layer's autograd graph, and offload the tensors that it saved to ``host``."""

    def __init__(self, host: HostActivations) -> None:
        self._host, self._keep = host, Keep()

    def forward(self, layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Any]:
        with self._host.offload() as offloaded:
            output, graph = self._keep.forward(layer, hidden, rotary)
        return output, (offloaded, graph)

    def prefetch(self, saved: tuple[OffloadedPass, Any]) -> None:
        self._host.bring(saved[0])

    def backward(
        self, layer: Layer, saved: tuple[OffloadedPass, Any], grad: Tensor, rotary: Rotary
    ) -> Tensor:
        offloaded, graph = saved
        input_grad = self._keep.backward(layer, graph, grad, rotary)  # (N, C)
        self._host.drop(offloaded)
        return input_grad

    def discard(self) -> None:
        self._host.discard()

    def resize(self, pieces: int) -> None:
        self._host.resize(pieces)

    def take_traffic(self) -> Traffic:
        return self._host.take_traffic()


class _Entry(torch.autograd.Function):
    """The beginning of a layer's graph. Its backward appends the gradient of the layer's input to
    a list. A leaf tensor would keep the layer's input alive for as long as the graph lives.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden: Tensor, input_grads: list[Tensor]) -> Tensor:
        ctx.input_grads = input_grads
        return hidden.view_as(hidden)  # (N, C)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.input_grads.append(grad)  # (N, C)
        return None, None, None


_anchor = torch.empty(0, requires_grad=True)  # makes autograd record the operations after it


def _with_graph(layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, list[Tensor]]:
    """The layer's output (N, C) with its graph, and the list to which backward appends the gradient
    of ``hidden`` (N, C).
    """
    input_grads: list[Tensor] = []
    with torch.enable_grad():
        return layer(_Entry.apply(_anchor, hidden, input_grads), rotary), input_grads


def _through(edge: GradientEdge, grad: Tensor, input_grads: list[Tensor]) -> Tensor:
    torch.autograd.backward(edge, grad)
    return input_grads.pop()
