"""The whole frozen base on the device."""

from torch import Tensor

from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer


class ResidentStore:
    """Every layer's flat buffer stays where it is: prefetch and release have nothing to move."""

    def __init__(self, flats: list[Tensor], frozen_format: FrozenFormat) -> None:
        self._flats = flats
        self._format = frozen_format

    def __len__(self) -> int:
        return len(self._flats)

    def prefetch(self, layer: int) -> None:
        """Nothing to bring."""

    def get(self, layer: int) -> FrozenLayer:
        """The layer's frozen tensors, valid until ``release``."""
        return FrozenLayer(self._flats[layer], self._format)

    def release(self, layer: int) -> None:
        """Nothing to free."""
