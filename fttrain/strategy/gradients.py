"""Gradient buffers of the adapters, and the start of their reduction.

Resident: one flat fp32 tensor a layer, on the device. Double-buffered: two device buffers serve all
layers in turn. A layer's gradient is copied from its buffer to the layer's storage as soon as its
backward ends, and copied back where another group of micro-batches adds to it. The storage is host
memory (``optim.offload``), or this rank's shard of the sum on the device (``optim.shard``). Each
direction has its own side stream: a copy in must not queue behind a copy out that waits for its
reduction.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fttrain.distributed.collectives import Handle
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.store.side_stream import SideStream, copy, copy_stream
from fttrain.strategy.grad_reduce import GradientSync, SyncStats

BUFFERS = 2  # backward adds to one, the other is copied out


class GradientBuffers(Protocol):
    """Gradients of one step. The strategy calls ``start`` and ``finish``; the schedule calls
    ``begin_layer`` and ``end_layer`` in between.
    """

    def start(self) -> None:
        """Begin a step: all gradients are zero."""
        ...

    def begin_layer(self, layer: int) -> None:
        """Bind a buffer with the layer's gradient of this step so far, to which backward adds."""
        ...

    def end_layer(self, layer: int, last: bool) -> None:
        """Take the layer's gradient after a group's backward. ``last``: it is complete on this
        rank, and its reduction is started.
        """
        ...

    def finish(self) -> tuple[Tensor, SyncStats]:
        """Wait for all reductions. Return the gradients' norms fp32 (layers,) on the device, and
        the traffic.

        Each parameter's ``grad`` then holds the sum, on the parameter's device. Norms are those of
        the values that this rank updates.
        """
        ...


class ResidentGradients:
    """Gradients of all layers, whole, on the device."""

    def __init__(self, layers: list[LayerAdapters], sync: GradientSync) -> None:
        self._layers, self._sync = layers, sync
        for layer in layers:
            whole = torch.zeros(layer.layout.values, device=layer.flat.device)
            layer.flat.grad = layer.layout.shard.view(whole)
            layer.bind_gradient(whole)

    def start(self) -> None:
        for layer in self._layers:
            layer.grad.zero_()

    def begin_layer(self, layer: int) -> None:
        """Do nothing: the buffer is always bound."""

    def end_layer(self, layer: int, last: bool) -> None:
        if last:
            self._sync.launch(self._layers[layer].grad)

    def finish(self) -> tuple[Tensor, SyncStats]:
        stats = self._sync.wait()
        return torch.stack([_grad(layer).norm() for layer in self._layers]), stats


class DoubleBufferedGradients:
    """Two device buffers for all layers, and ``storage`` of each layer: fp32 (values of the
    layer,), or (values of this rank's shard,) where a step is one group of micro-batches. On CUDA,
    storage in host memory is page-locked.
    """

    def __init__(
        self,
        layers: list[LayerAdapters],
        sync: GradientSync,
        device: torch.device,
        storage: list[Tensor],
        out: SideStream | None = None,
        back: SideStream | None = None,
    ) -> None:
        self._layers, self._sync, self._storage = layers, sync, storage
        for layer, flat in zip(layers, storage, strict=True):
            whole = len(flat) == layer.layout.values
            layer.flat.grad = layer.layout.shard.view(flat) if whole else flat
        self._out, self._back = out or copy_stream(device), back or copy_stream(device)
        # All layers of a model have adapters of the same size.
        values = layers[0].layout.values
        self._buffers = [torch.zeros(values, device=device) for _ in range(BUFFERS)]
        self._leaving: list[Handle | None] = [None] * BUFFERS  # the copy out of each buffer
        self._left: dict[int, Handle] = {}  # layer -> its last copy out
        self._turn = 0  # index of the bound buffer
        self._empty: set[int] = set()  # layers whose gradient is still zero in this step
        self._norms = torch.zeros(len(layers), dtype=torch.float32, device=device)

    def start(self) -> None:
        self._empty = set(range(len(self._layers)))
        self._norms.zero_()

    def begin_layer(self, layer: int) -> None:
        self._turn = (self._turn + 1) % BUFFERS
        buffer, leaving = self._buffers[self._turn], self._leaving[self._turn]
        if leaving is not None:
            leaving.wait()
        if layer in self._empty:
            self._empty.remove(layer)
            buffer.zero_()
        else:
            self._left[layer].wait()
            self._back.run(partial(copy, buffer, self._storage[layer])).wait()
        self._layers[layer].bind_gradient(buffer)

    def end_layer(self, layer: int, last: bool) -> None:
        buffer = self._buffers[self._turn]
        summed = self._sync.launch(buffer) if last else None
        leaving = self._out.run(partial(self._leave, layer, buffer, summed))
        self._leaving[self._turn] = self._left[layer] = leaving

    def finish(self) -> tuple[Tensor, SyncStats]:
        stats = self._sync.wait()
        for leaving in self._leaving:
            if leaving is not None:
                leaving.wait()  # the compute reads the norms
        if self._storage[0].device.type == "cpu":
            self._out.synchronize()  # the optimizer reads the gradients on the host
        return self._norms, stats

    @torch.no_grad()
    def _leave(self, layer: int, buffer: Tensor, summed: Handle | None) -> None:
        if summed is None:
            copy(self._storage[layer], buffer)
            return
        summed.wait()
        adapters = self._layers[layer]
        shard = adapters.layout.shard.view(buffer)
        self._norms[layer] = shard.norm()
        copy(_grad(adapters), shard)


def _grad(layer: LayerAdapters) -> Tensor:
    """The gradient of this rank's shard, fp32 (values of the shard,)."""
    assert layer.flat.grad is not None
    return layer.flat.grad
