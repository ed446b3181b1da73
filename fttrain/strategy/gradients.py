"""Where adapter gradients live between a layer's backward passes, and when they are summed.

Resident: one flat fp32 tensor a layer, on the device. Passing: two device tensors serve all layers
in turn; a layer's gradient leaves for its place as soon as its backward ends, double-buffered, and
comes back where another group of micro-batches adds to it. The place is host memory
(``optim.offload``), or on the device a rank's part of the sum (``optim.shard``). Each direction has
a side stream of its own: a gradient on its way in does not queue behind the sum that one on its way
out waits for.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fttrain.distributed.collectives import Handle
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.store.side_stream import SideStream, copy, copy_stream
from fttrain.strategy.grad_reduce import GradientSync, SyncStats

BUFFERS = 2  # one that backward adds to, one that leaves


class GradientBuffers(Protocol):
    """Gradients of one step: ``start``, then ``open`` and ``close`` by the schedule, ``finish``."""

    def start(self) -> None:
        """A step begins: all gradients are zero."""
        ...

    def open(self, layer: int) -> None:
        """Bind the layer's gradient, with what this step has added so far."""
        ...

    def close(self, layer: int, last: bool) -> None:
        """``last``: the layer's gradient is complete on this rank; start summing it."""
        ...

    def finish(self) -> tuple[Tensor, SyncStats]:
        """Until all is summed: fp32 (layers,) norms on the device, and the traffic.

        From here on each parameter's ``grad`` holds the sum, on the parameter's device. Norms are
        those of what this rank updates.
        """
        ...


class ResidentGradients:
    """All of them whole on the device."""

    def __init__(self, layers: list[LayerAdapters], sync: GradientSync) -> None:
        self._layers, self._sync = layers, sync
        for layer in layers:
            whole = torch.zeros(layer.layout.values, device=layer.flat.device)
            layer.flat.grad = layer.layout.portion.of(whole)
            layer.bind_gradient(whole)

    def start(self) -> None:
        for layer in self._layers:
            layer.grad.zero_()

    def open(self, layer: int) -> None:
        """It is bound for good."""

    def close(self, layer: int, last: bool) -> None:
        if last:
            self._sync.launch(self._layers[layer].grad)

    def finish(self) -> tuple[Tensor, SyncStats]:
        stats = self._sync.wait()
        return torch.stack([_grad(layer).norm() for layer in self._layers]), stats


class DoubleBufferedGradients:
    """``places``: fp32, for each layer (values of the layer,), or where a step is one group
    (values of this rank's part,). In host memory they are page-locked where that matters.
    """

    def __init__(
        self,
        layers: list[LayerAdapters],
        sync: GradientSync,
        device: torch.device,
        places: list[Tensor],
        out: SideStream | None = None,
        back: SideStream | None = None,
    ) -> None:
        self._layers, self._sync, self._places = layers, sync, places
        for layer, place in zip(layers, places, strict=True):
            whole = len(place) == layer.layout.values
            layer.flat.grad = layer.layout.portion.of(place) if whole else place
        self._out, self._back = out or copy_stream(device), back or copy_stream(device)
        # All layers of a model have adapters of the same size.
        values = layers[0].layout.values
        self._buffers = [torch.zeros(values, device=device) for _ in range(BUFFERS)]
        self._leaving: list[Handle | None] = [None] * BUFFERS  # out of each buffer
        self._left: dict[int, Handle] = {}  # of each layer, where it last went out
        self._turn = 0
        self._empty: set[int] = set()  # layers to which this step has not added yet
        self._norms = torch.zeros(len(layers), dtype=torch.float32, device=device)

    def start(self) -> None:
        self._empty = set(range(len(self._layers)))
        self._norms.zero_()

    def open(self, layer: int) -> None:
        self._turn = (self._turn + 1) % BUFFERS
        buffer, leaving = self._buffers[self._turn], self._leaving[self._turn]
        if leaving is not None:
            leaving.wait()
        if layer in self._empty:
            self._empty.remove(layer)
            buffer.zero_()
        else:
            self._left[layer].wait()
            self._back.run(partial(copy, buffer, self._places[layer])).wait()
        self._layers[layer].bind_gradient(buffer)

    def close(self, layer: int, last: bool) -> None:
        buffer = self._buffers[self._turn]
        summed = self._sync.launch(buffer) if last else None
        leaving = self._out.run(partial(self._leave, layer, buffer, summed))
        self._leaving[self._turn] = self._left[layer] = leaving

    def finish(self) -> tuple[Tensor, SyncStats]:
        stats = self._sync.wait()
        for leaving in self._leaving:
            if leaving is not None:
                leaving.wait()  # the norms are the compute's
        if self._places[0].device.type == "cpu":
            self._out.synchronize()  # the optimizer reads the gradients on the host
        return self._norms, stats

    @torch.no_grad()
    def _leave(self, layer: int, buffer: Tensor, summed: Handle | None) -> None:
        if summed is None:
            copy(self._places[layer], buffer)
            return
        summed.wait()
        adapters = self._layers[layer]
        own = adapters.layout.portion.of(buffer)
        self._norms[layer] = own.norm()
        copy(_grad(adapters), own)


def _grad(layer: LayerAdapters) -> Tensor:
    """Of this rank's part."""
    assert layer.flat.grad is not None
    return layer.flat.grad
