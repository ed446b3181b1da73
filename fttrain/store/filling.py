"""Layers on their way from the disk to where a store keeps them, at the speed of the disk."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from fttrain.store import FrozenBase
from fttrain.store.lane import copy, copy_lane

Progress = Callable[[int, int], None]  # (done, total)


def to_device(
    base: FrozenBase,
    layers: Iterable[int],
    size_bytes: int,
    device: torch.device,
    progress: Progress,
    offset_bytes: int = 0,
) -> list[Tensor]:
    """uint8 (size_bytes,) of each of ``layers`` from ``offset_bytes`` on, on ``device``.

    On CUDA a layer is read into one of two page-locked buffers while the one before it is copied.
    """
    layers = list(layers)
    if device.type != "cuda":
        flats = []
        for done, layer in enumerate(layers, start=1):
            flats.append(torch.empty(size_bytes, dtype=torch.uint8))
            base.read(layer, flats[-1], offset_bytes)
            progress(done, len(layers))
        return flats
    lane = copy_lane(device)
    staging = torch.empty(2, size_bytes, dtype=torch.uint8, pin_memory=True)
    flats = []
    for done, layer in enumerate(layers, start=1):
        on_host = staging[done % 2]
        base.read(layer, on_host, offset_bytes)
        lane.synchronize()  # the copy of the layer before, out of the other buffer
        flats.append(torch.empty(size_bytes, dtype=torch.uint8, device=device))
        lane.run(partial(copy, flats[-1], on_host))
        progress(done, len(layers))
    lane.synchronize()
    return flats
