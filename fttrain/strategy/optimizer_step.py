"""Optimizer steps: on the device, or on the host while the next step computes.

On the host a thread takes the layers in the order of the next forward: clip, step the optimizer,
round to the compute dtype, copy to the device. A layer's forward waits for its own weights only.

    backward of step n | norm |  forward of step n + 1   layer 0   layer 1   layer 2 ...
    the host                     [ layer 0 ][ layer 1 ][ layer 2 ] ...
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from fttrain.distributed.collectives import Handle
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.optim.optimizer import Optimizer
from fttrain.store.side_stream import copy_stream, device_thread


@dataclass(frozen=True)
class UpdateStats:
    """Figures of an update: of this step on the device; of the previous step in host memory, where
    an update runs on after its own step has ended.
    """

    optim_bytes: int = 0  # gradients copied to the host and weights copied to the device
    optim_gather_bytes: int = 0  # weights received from other ranks' shards
    optim_s: float = 0.0  # compute time of the host
    optim_wait_s: float = 0.0  # the next step's wait for it; the rest was hidden


class Update(Protocol):
    """The update of the masters by a step's complete gradients."""

    def start(self, factor: float, lr: float) -> None:
        """Multiply every gradient by ``factor`` and step the optimizer."""
        ...

    def settle(self) -> None:
        """Wait until masters and optimizer state are those after the last step."""
        ...

    def take_stats(self) -> UpdateStats:
        """The figures of the last complete update; zeros when they were taken before."""
        ...


def update_layer(
    layer: LayerAdapters, index: int, optimizer: Optimizer, factor: float, lr: float
) -> None:
    """Clip, step and round one layer on the device of its masters. ``index``: the layer's in
    ``optimizer``.
    """
    assert layer.flat.grad is not None
    layer.flat.grad.mul_(factor)
    optimizer.step(index, lr)
    layer.stage()


class DeviceUpdate:
    """An update on the device, issued at once."""

    def __init__(self, layers: Sequence[LayerAdapters], optimizer: Optimizer) -> None:
        self._layers, self._optimizer = layers, optimizer
        self._stats = UpdateStats()

    def start(self, factor: float, lr: float) -> None:
        self.settle()
        for index, layer in enumerate(self._layers):
            update_layer(layer, index, self._optimizer, factor, lr)
        for layer in self._layers:  # in the order of the next forward
            layer.expect(layer.gather())
        self._stats = UpdateStats(optim_gather_bytes=_gather_bytes(self._layers))

    def settle(self) -> None:
        for layer in self._layers:
            layer.ready()

    def take_stats(self) -> UpdateStats:
        stats, self._stats = self._stats, UpdateStats()
        return stats


class HostUpdate:
    """An update in host memory, layer by layer on a thread."""

    def __init__(
        self, layers: Sequence[LayerAdapters], optimizer: Optimizer, device: torch.device
    ) -> None:
        self._layers, self._optimizer = layers, optimizer
        self._thread = device_thread(device, "optimizer")
        self._stream = copy_stream(device)
        self._under_way: list[_WeightsHandle] = []
        self._busy_s = self._wait_s = 0.0
        self._bytes = sum(layer.flat.nbytes + layer.copy_bytes for layer in layers)
        self._stats = UpdateStats()

    def start(self, factor: float, lr: float) -> None:
        self.settle()
        for index, layer in enumerate(self._layers):
            sent = self._thread.submit(self._update, index, layer, factor, lr)
            self._under_way.append(_WeightsHandle(sent, layer, self._waited))
            layer.expect(self._under_way[-1])

    def settle(self) -> None:
        for layer in self._layers:
            layer.ready()
        if self._under_way:
            received_bytes = _gather_bytes(self._layers)
            self._stats = UpdateStats(self._bytes, received_bytes, self._busy_s, self._wait_s)
            self._under_way, self._busy_s, self._wait_s = [], 0.0, 0.0

    def take_stats(self) -> UpdateStats:
        stats, self._stats = self._stats, UpdateStats()
        return stats

    def _update(self, index: int, layer: LayerAdapters, factor: float, lr: float) -> Handle:
        started = time.perf_counter()
        update_layer(layer, index, self._optimizer, factor, lr)
        self._busy_s += time.perf_counter() - started
        return self._stream.run(layer.send)

    def _waited(self, seconds: float) -> None:
        self._wait_s += seconds


class _WeightsHandle:
    """A layer's new weights: the host waits for the update, the compute for the copy."""

    def __init__(
        self, sent: "Future[Handle]", layer: LayerAdapters, waited: Callable[[float], None]
    ) -> None:
        self._sent, self._layer, self._waited = sent, layer, waited

    def wait(self) -> None:
        started = time.perf_counter()
        self._sent.result().wait()
        # Not on the thread: all ranks must issue their collectives in the same order.
        self._layer.gather().wait()
        self._waited(time.perf_counter() - started)


def _gather_bytes(layers: Sequence[LayerAdapters]) -> int:
    """Bytes of weights that an update receives from other ranks' shards."""
    others = (layer.layout.shard.world_size - 1 for layer in layers)
    return sum(layer.copy_bytes * count for layer, count in zip(layers, others, strict=True))
