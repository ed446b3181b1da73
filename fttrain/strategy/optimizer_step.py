"""How a clipped gradient becomes new weights: on the device, or on the host beside the next step.

On the host a thread takes the layers in the order in which the next forward needs them: clip, step
the optimizer, round to the compute dtype, send. A layer's forward waits for its own weights only.

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
    """An update: on the device of this step, in host memory, where it goes on when its own step has
    ended, of the step before.
    """

    optim_bytes: int = 0  # gradients that came to the host and weights that went to the device
    optim_gather_bytes: int = 0  # weights of other ranks' parts that came from them
    optim_s: float = 0.0  # the host worked on it
    optim_wait_s: float = 0.0  # the next step waited for it; the rest was hidden


class Update(Protocol):
    """Applies a step's gradients, which are complete."""

    def start(self, factor: float, lr: float) -> None:
        """Multiply every gradient by ``factor`` and step the optimizer."""
        ...

    def settle(self) -> None:
        """Until masters and optimizer state are those after the last step."""
        ...

    def take_stats(self) -> UpdateStats:
        """Of the last update that is over, once."""
        ...


def update_layer(
    layer: LayerAdapters, place: int, optimizer: Optimizer, factor: float, lr: float
) -> None:
    """Clip, step and round one layer, where its masters lie. ``place``: among the optimizer's."""
    assert layer.flat.grad is not None
    layer.flat.grad.mul_(factor)
    optimizer.step(place, lr)
    layer.stage()


class DeviceUpdate:
    """At once, on the device."""

    def __init__(self, layers: Sequence[LayerAdapters], optimizer: Optimizer) -> None:
        self._layers, self._optimizer = layers, optimizer
        self._stats = UpdateStats()

    def start(self, factor: float, lr: float) -> None:
        self.settle()
        for place, layer in enumerate(self._layers):
            update_layer(layer, place, self._optimizer, factor, lr)
        for layer in self._layers:  # in the order in which the next forward needs them
            layer.expect(layer.gather())
        self._stats = UpdateStats(optim_gather_bytes=_gather_bytes(self._layers))

    def settle(self) -> None:
        for layer in self._layers:
            layer.ready()

    def take_stats(self) -> UpdateStats:
        stats, self._stats = self._stats, UpdateStats()
        return stats


class HostUpdate:
    """In host memory, layer by layer on a thread."""

    def __init__(
        self, layers: Sequence[LayerAdapters], optimizer: Optimizer, device: torch.device
    ) -> None:
        self._layers, self._optimizer = layers, optimizer
        self._thread = device_thread(device, "optimizer")
        self._stream = copy_stream(device)
        self._under_way: list[_Arriving] = []
        self._busy_s = self._wait_s = 0.0
        self._bytes = sum(layer.flat.nbytes + layer.copy_bytes for layer in layers)
        self._stats = UpdateStats()

    def start(self, factor: float, lr: float) -> None:
        self.settle()
        for place, layer in enumerate(self._layers):
            sent = self._thread.submit(self._work, place, layer, factor, lr)
            self._under_way.append(_Arriving(sent, layer, self._waited))
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

    def _work(self, place: int, layer: LayerAdapters, factor: float, lr: float) -> Handle:
        started = time.perf_counter()
        update_layer(layer, place, self._optimizer, factor, lr)
        self._busy_s += time.perf_counter() - started
        return self._stream.run(layer.send)

    def _waited(self, seconds: float) -> None:
        self._wait_s += seconds


class _Arriving:
    """New weights: the host waits until they are made, the compute until they are there."""

    def __init__(
        self, sent: "Future[Handle]", layer: LayerAdapters, waited: Callable[[float], None]
    ) -> None:
        self._sent, self._layer, self._waited = sent, layer, waited

    def wait(self) -> None:
        started = time.perf_counter()
        self._sent.result().wait()
        # Here and not on the thread: ranks must ask for all that they exchange in one order.
        self._layer.gather().wait()
        self._waited(time.perf_counter() - started)


def _gather_bytes(layers: Sequence[LayerAdapters]) -> int:
    """What an update fetches of other ranks' parts."""
    others = (layer.layout.portion.world_size - 1 for layer in layers)
    return sum(layer.copy_bytes * count for layer, count in zip(layers, others, strict=True))
