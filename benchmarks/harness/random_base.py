"""A frozen base of any shape without a checkpoint: random codes, scales of a usual size."""

from pathlib import Path

import torch
from torch import Tensor

from fttrain.quant.checksum import checksum
from fttrain.quant.frozen_layer import FrozenFormat

SCALE = 0.05  # of a block of weights: NF4 codes reach from -1 to 1
DEVIATION = 0.02  # of the embedding and of the head


class RandomBase:
    """A ``FrozenBase`` all of whose layers are the same bytes: speed and memory do not depend on
    them.
    """

    tied = False

    def __init__(self, layers: int, frozen_format: FrozenFormat, seed: int = 0) -> None:
        self._layers = layers
        self._generator = torch.Generator().manual_seed(seed)
        self._flat = self._layer(frozen_format)
        self._checksum = int(checksum(self._flat))

    def _layer(self, frozen_format: FrozenFormat) -> Tensor:
        flat = torch.zeros(frozen_format.layout.size_bytes, dtype=torch.uint8)
        for name, view in frozen_format.layout.views(flat).items():
            if view.dtype == torch.uint8:  # packed weights, codes of scales
                view.random_(0, 256, generator=self._generator)
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
        into.copy_(self._flat[offset_bytes : offset_bytes + len(into)])

    def checksum(self, layer: int) -> int:
        return self._checksum

    def path(self, layer: int) -> Path:
        return Path("random")

    def read_end(self, name: str, into: Tensor) -> None:
        if name == "final_norm":
            into.fill_(1)
        else:
            into.normal_(std=DEVIATION, generator=self._generator)
