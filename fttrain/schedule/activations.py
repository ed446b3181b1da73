"""What a layer's pass leaves for its backward: a policy for each layer.

    policy     leaves                                         backward
    recompute  the layer's input                              runs the layer again first
    keep       all that backward reads, on the device         reads it
    offload    the same, in host memory (store/activations)   reads what has come back meanwhile

Legend: N tokens, C hidden width.
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
    """How one layer passes a micro-batch; ``layer`` is bound to its bytes, lengths and dropout."""

    @abstractmethod
    def forward(self, layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Any]:
        """``hidden`` (N, C) -> the layer's output (N, C), and what backward starts from."""

    def prefetch(self, saved: Any) -> None:  # noqa: B027
        """Its backward is next: bring what is not there."""

    @abstractmethod
    def backward(self, layer: Layer, saved: Any, grad: Tensor, rotary: Rotary) -> Tensor:
        """``grad`` of the output (N, C) -> that of the input (N, C). Adds to the adapters'."""

    def discard(self) -> None:  # noqa: B027
        """No backward of what was saved will come: every place is free again."""

    def resize(self, pieces: int) -> None:  # noqa: B027
        """Micro-batches have 1 / ``pieces`` of the rows from here on, and there are as many times
        more of them. Nothing is saved now.
        """

    def take_traffic(self) -> Traffic:
        """What it moved since the last call."""
        return Traffic()


Policies = Sequence[Policy]  # by layer of the decoder


class Recompute(Policy):
    """Only the layer's input is kept, where ``inputs`` says."""

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
            output, taken = _with_graph(layer, hidden, rotary)
        finally:  # memory may run out; the layer is used again
            layer.state.recomputing = False
        edge = get_gradient_edge(output)
        del output  # nothing reads it; the edge alone keeps the graph
        return _through(edge, grad, taken)

    def discard(self) -> None:
        self._inputs.discard()

    def resize(self, pieces: int) -> None:
        self._inputs.resize(pieces)


class Keep(Policy):
    """The layer's graph is kept, with all that it saved."""

    def forward(self, layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Any]:
        output, taken = _with_graph(layer, hidden, rotary)
        # The graph's end without the output, which need not live as long as it.
        return output.detach(), (get_gradient_edge(output), taken)

    def backward(self, layer: Layer, saved: Any, grad: Tensor, rotary: Rotary) -> Tensor:
        edge, taken = saved
        return _through(edge, grad, taken)


class Offload(Policy):
    """The layer's graph is kept, and what it saved goes to ``host``."""

    def __init__(self, host: HostActivations) -> None:
        self._host, self._keep = host, Keep()

    def forward(self, layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Any]:
        with self._host.taking() as kept:
            output, graph = self._keep.forward(layer, hidden, rotary)
        return output, (kept, graph)

    def prefetch(self, saved: tuple[OffloadedPass, Any]) -> None:
        self._host.bring(saved[0])

    def backward(
        self, layer: Layer, saved: tuple[OffloadedPass, Any], grad: Tensor, rotary: Rotary
    ) -> Tensor:
        kept, graph = saved
        found = self._keep.backward(layer, graph, grad, rotary)
        self._host.drop(kept)
        return found

    def discard(self) -> None:
        self._host.discard()

    def resize(self, pieces: int) -> None:
        self._host.resize(pieces)

    def take_traffic(self) -> Traffic:
        return self._host.take_traffic()


class _Entry(torch.autograd.Function):
    """Where a layer's graph begins: takes the gradient out of it. A leaf would keep its value, the
    layer's input, for as long as the graph lives.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden: Tensor, taken: list[Tensor]) -> Tensor:
        ctx.taken = taken
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.taken.append(grad)
        return None, None, None


_anchor = torch.empty(0, requires_grad=True)  # makes autograd record what follows it


def _with_graph(layer: Layer, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, list[Tensor]]:
    """The layer's output with its graph, and the list in which backward leaves the gradient of
    ``hidden``.
    """
    taken: list[Tensor] = []
    with torch.enable_grad():
        return layer(_Entry.apply(_anchor, hidden, taken), rotary), taken


def _through(edge: GradientEdge, grad: Tensor, taken: list[Tensor]) -> Tensor:
    torch.autograd.backward(edge, grad)
    return taken.pop()
