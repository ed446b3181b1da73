"""Loading of frozen layers from the disk into a store's memory, at the speed of the disk."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from fttrain.memory.ledger import MemoryLedger
from fttrain.memory.parts import MemoryPart
from fttrain.store import FrozenBase
from fttrain.store.side_stream import copy, copy_stream

Progress = Callable[[int, int], None]  # (done, total)


def reserve_layers(ledger: MemoryLedger, count: int, size_bytes: int) -> None:
    """Reserve what ``to_device`` needs for ``count`` buffers of ``size_bytes``."""
    ledger.reserve(MemoryPart.FROZEN_LAYERS, count * size_bytes)
    if ledger.device.type == "cuda":
        ledger.reserve(MemoryPart.LAYER_STAGING, 2 * size_bytes)


def in_turn(layers: Sequence[int], rank: int, world_size: int) -> list[int]:
    """``layers`` in the order in which ``rank`` reads them where every rank reads all. Each rank
    begins at a different layer, and later finds in the page cache what others have read
    (docs/lab-log.md).
    """
    first = rank * len(layers) // world_size
    return [*layers[first:], *layers[:first]]


def to_device(
    base: FrozenBase,
    layers: Iterable[int],
    size_bytes: int,
    ledger: MemoryLedger,
    progress: Progress,
    offset_bytes: int = 0,
) -> list[Tensor]:
    """uint8 (size_bytes,) of each of ``layers`` from ``offset_bytes`` on, on the ledger's device.

    On CUDA a layer is read into one of two page-locked buffers while the one before it is copied.
    """
    layers, device = list(layers), ledger.device
    if device.type != "cuda":
        flats = []
        for done, layer in enumerate(layers, start=1):
            flats.append(torch.empty(size_bytes, dtype=torch.uint8))
            base.read(layer, flats[-1], offset_bytes)
            progress(done, len(layers))
        return flats
    if not layers:
        return []
    stream = copy_stream(device)
    staging = ledger.allocate(MemoryPart.LAYER_STAGING).view(2, size_bytes)
    flats = []
    for done, layer in enumerate(layers, start=1):
        on_host = staging[done % 2]
        base.read(layer, on_host, offset_bytes)
        stream.synchronize()  # the previous layer's copy, out of the other buffer
        flats.append(torch.empty(size_bytes, dtype=torch.uint8, device=device))
        stream.run(partial(copy, flats[-1], on_host))
        progress(done, len(layers))
    stream.synchronize()
    return flats
