"""The offsets of a layer's tensors in the layer's one flat buffer.

A layer is moved as a whole, so its frozen tensors form one aligned ``uint8`` buffer. Its size
is a multiple of lcm(1..8) * 256 bytes, so that any world_size up to 8 shards it as
``flat.view(world_size, -1)[rank]``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.util.units import round_up

ALIGN_BYTES = 256  # of each tensor's start: CUDA kernels load vectors from there
FLAT_MULTIPLE_BYTES = math.lcm(*range(1, 9)) * ALIGN_BYTES


@dataclass(frozen=True)
class Slot:
    """One tensor inside the flat buffer."""

    offset_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """The slot of each tensor by name. One layout serves every layer of the same shape."""

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        self.slots: dict[str, Slot] = {}
        end = 0
        for name, shape, dtype in tensors:
            slot = Slot(round_up(end, ALIGN_BYTES), shape, dtype)
            self.slots[name] = slot
            end = slot.offset_bytes + slot.size_bytes
        self.size_bytes = round_up(end, FLAT_MULTIPLE_BYTES)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Every tensor of the layer by name, as a view of ``flat`` uint8 (size_bytes,)."""
        return {
            name: flat[slot.offset_bytes : slot.offset_bytes + slot.size_bytes]
            .view(slot.dtype)
            .view(slot.shape)
            for name, slot in self.slots.items()
        }
