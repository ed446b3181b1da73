"""Where the frozen base lives, layer by layer.

A store brings a layer's bytes before they are needed and hands them out for as long as they are:
``prefetch(l)``, ``get(l)``, ``release(l)``. Schedules know no more of it than that.
"""

from typing import Protocol

from fttrain.quant.frozen_layer import FrozenLayer


class Store(Protocol):
    """What a schedule needs of a store."""

    def __len__(self) -> int:
        """How many layers there are."""
        ...

    def prefetch(self, layer: int) -> None:
        """Start bringing a layer. Layers outside 0..len - 1 are ignored."""
        ...

    def get(self, layer: int) -> FrozenLayer:
        """The layer's frozen tensors, valid until ``release``."""
        ...

    def release(self, layer: int) -> None:
        """The layer's bytes may be overwritten once the device has done what was asked so far."""
        ...
