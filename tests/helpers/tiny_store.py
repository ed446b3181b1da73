"""Layers of random bytes for the stores."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fttrain.distributed.collectives import Handle
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.store import Store, Traffic
from fttrain.store.side_stream import CollectiveSideStream, HostSideStream, Task, ThreadSideStream

CPU = torch.device("cpu")
FORMAT = FrozenFormat(
    (), {"norm.weight": (500,)}, QuantConfig(kind="none", double_quant=False), torch.float32
)
LAYER_BYTES = FORMAT.layout.size_bytes


def flats(layers: int, seed: int = 0) -> list[Tensor]:
    """uint8 (LAYER_BYTES,) of each layer."""
    generator = torch.Generator().manual_seed(seed)
    return list(
        torch.randint(256, (layers, LAYER_BYTES), dtype=torch.uint8, generator=generator).unbind(0)
    )


def passes_up_and_down(layers: int, count: int, seed: int = 0) -> list[list[int]]:
    """Layer orders of passes up and down (steps), some up alone (evaluation)."""
    chance = random.Random(seed)
    up = list(range(layers))
    return [up if chance.random() < 0.5 else up[::-1] for _ in range(count)]


def read(store: Store, orders: Sequence[Sequence[int]]) -> list[tuple[int, Tensor]]:
    """(layer, its bytes as they were given out) of passes over ``store``, used as schedules do."""
    found = []
    for order in orders:
        for position, layer in enumerate(order):
            store.prefetch(order[position:])
            found.append((layer, store.get(layer).flat.clone()))
            store.release(layer)
    return found


def steady(store: Store) -> Traffic:
    """What a pass up and down moves that begins with the first layers in the slots, as each step
    but the first one does.
    """
    up = list(range(len(store)))
    read(store, [up, up[::-1]])
    store.take_traffic()
    read(store, [up, up[::-1]])
    return store.take_traffic()


class CountingSideStream(ThreadSideStream):
    """Count the tasks that began and those that are done. Each takes ``task_s`` at least."""

    def __init__(self, task_s: float = 0.0) -> None:
        super().__init__()
        self.started = self.ended = 0
        self._task_s = task_s

    def run(self, task: Task, after: Any = None) -> Handle:
        def counted() -> Handle | None:
            time.sleep(self._task_s)
            handle = task()
            self.ended += 1
            return handle

        self.started += 1
        return super().run(counted, after)


def delay_streams(seed: int, most_s: float = 3e-3) -> None:
    """Start each task of this process's side streams late from now on, by a random time: mostly
    short, at most ``most_s``.
    """
    chance = random.Random(seed)
    for kind in (ThreadSideStream, CollectiveSideStream):
        kind._start = _late(kind._start, chance, most_s)  # type: ignore[method-assign]


def _late(
    start: Callable[[Any, Task], Any], chance: random.Random, most_s: float
) -> Callable[[HostSideStream, Task], Any]:
    def start_late(stream: HostSideStream, task: Task) -> Any:
        delay_s = most_s * chance.random() ** 3

        def late() -> Any:
            time.sleep(delay_s)
            return task()

        return start(stream, late)

    return start_late
