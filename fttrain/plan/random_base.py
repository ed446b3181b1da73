"""A frozen base of any shape without a checkpoint: random codes, typical scales."""

from pathlib import Path

import torch
from torch import Tensor

from fttrain.quant.checksum import checksum
from fttrain.quant.frozen_layer import FrozenFormat

SCALE = 0.05  # absmax of a block of weights: NF4 codes lie between -1 and 1
DEVIATION = 0.02  # standard deviation of the embedding and of the head
ENDS = ("embedding", "final_norm", "head")
STEP = 0x0101_0101_0101_0101  # added to each word from layer to layer: 1 in every byte
PIECE = 1 << 24  # values drawn for an end, then repeated: a billion would take half a minute
MOST_LAYERS = 255  # more layers would repeat a byte


class RandomBase:
    """A ``FrozenBase`` made of one layer's bytes: in layer l, l * STEP is added to every word of
    the packed weights, in wrapping 64-bit integers.

    Any two layers differ in each of these bytes, so a wrong or a half-filled slot fails the check
    of its sum, and other weights give another loss. Still there is only one copy, and filling a
    slot costs little more than copying it.
    """

    tied = False

    def __init__(self, layers: int, frozen_format: FrozenFormat, seed: int = 0) -> None:
        if layers > MOST_LAYERS:
            raise ValueError(f"{layers} layers: {MOST_LAYERS} at most can be told apart")
        self._layers, self._seed = layers, seed
        # Begin and end of each tensor of packed weights, in bytes; multiples of 8.
        self._packed = [
            (slot.offset_bytes, slot.offset_bytes + slot.size_bytes)
            for name, slot in frozen_format.layout.slots.items()
            if name.endswith(".packed")
        ]
        self._flat = self._layer(frozen_format)  # uint8 (layout.size_bytes,): layer 0
        self._checksum = int(checksum(self._flat))

    def _layer(self, frozen_format: FrozenFormat) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        flat = torch.zeros(frozen_format.layout.size_bytes, dtype=torch.uint8)
        for name, view in frozen_format.layout.views(flat).items():
            if name.endswith(".packed"):
                view.view(torch.int64).random_(-(2**63), None, generator=generator)
            elif view.dtype == torch.uint8:  # codes of scales
                view.random_(0, 256, generator=generator)
            elif name.endswith(".nested_absmax"):
                view.fill_(SCALE / 4)
            elif name.endswith(".offset"):
                view.fill_(SCALE)
            else:  # norms
                view.fill_(1)
        return flat

    def __len__(self) -> int:
        return self._layers

    def read(self, layer: int, into: Tensor, offset_bytes: int = 0) -> None:
        """Fill ``into``, as ``FrozenBase.read``; ``offset_bytes`` and the length are multiples of
        8.
        """
        into.copy_(self._flat[offset_bytes : offset_bytes + len(into)])
        for begin, end in self._packed:
            part = into[max(begin - offset_bytes, 0) : max(end - offset_bytes, 0)]
            part.view(torch.int64).add_(_wrapped(layer * STEP))

    def checksum(self, layer: int) -> int:
        # It is linear in the words; word i weighs 2 i + 1, and those below word n weigh n * n.
        weight = sum((end // 8) ** 2 - (begin // 8) ** 2 for begin, end in self._packed)
        return _wrapped(self._checksum + layer * STEP * weight)

    def path(self, layer: int) -> Path:
        return Path("random")

    def read_end(self, name: str, into: Tensor) -> None:
        """Fill ``into`` alike on every rank, whichever ends it has: one piece, repeated."""
        if name == "final_norm":
            into.fill_(1)
            return
        generator = torch.Generator().manual_seed(self._seed + 1 + ENDS.index(name))
        piece, *others = into.view(-1).split(PIECE)
        piece.normal_(std=DEVIATION, generator=generator)
        for other in others:
            other.copy_(piece[: len(other)])


def _wrapped(value: int) -> int:
    """``value`` wrapped to int64."""
    return (value + 2**63) % 2**64 - 2**63
