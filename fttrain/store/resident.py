"""Resident store: the whole frozen base, or a pipeline stage's layers, on the device."""

from collections.abc import Sequence

from torch import Tensor

from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer
from fttrain.store import Traffic


class ResidentStore:
    """``flats``: uint8 (layer_bytes,) of each layer, on the device. Nothing is ever moved."""

    def __init__(self, flats: list[Tensor], frozen_format: FrozenFormat) -> None:
        self._flats = flats
        self._format = frozen_format

    def __len__(self) -> int:
        return len(self._flats)

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Do nothing: every layer is there."""

    def get(self, layer: int) -> FrozenLayer:
        return FrozenLayer(self._flats[layer], self._format)

    def release(self, layer: int) -> None:
        """Do nothing: no layer is overwritten."""

    def take_traffic(self) -> Traffic:
        return Traffic()
