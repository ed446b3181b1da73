"""Where the frozen base lives, layer by layer.

A store brings layers before they are needed and hands them out for as long as they are:
``prefetch(upcoming)``, ``get(l)``, ``release(l)``. Schedules know no more of it than that.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import add
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fttrain.quant.frozen_layer import FrozenLayer


@dataclass(frozen=True)
class Traffic:
    """What this rank moved so that its layers could run, and how long the compute stood still for
    it, since the last ``take_traffic``.

    Not in it: what ``layer_inputs=host``, ``embedding=host`` and ``optim.offload`` move between
    host and device, nor gradients that are summed over ranks.
    """

    gather_bytes: int = 0  # parts of frozen layers, received from other ranks
    h2d_bytes: int = 0  # frozen layers and a streamed head, copied from host memory to the device
    stage_bytes: int = 0  # boundaries and their gradients, sent to other stages of a pipeline
    activation_bytes: int = 0  # offloaded activations that came back from host memory
    # seconds in which the compute waited for a frozen layer, a streamed head, activations to come
    # back, or the boundary or gradient of another stage; on CUDA those of waits that were over when
    # it was asked
    wait_s: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Of two parts of a rank, one after the other."""
        return Traffic(*map(add, astuple(self), astuple(other)))


class Store(Protocol):
    """What a schedule needs of a store."""

    def __len__(self) -> int:
        """How many layers there are."""
        ...

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """These layers are needed next, in this order: start bringing as many as there is room
        for.
        """
        ...

    def get(self, layer: int) -> FrozenLayer:
        """The layer's frozen tensors, valid until ``release``."""
        ...

    def release(self, layer: int) -> None:
        """The layer's bytes may be overwritten once the device has done what was asked so far."""
        ...

    def take_traffic(self) -> Traffic:
        """What was moved since the last call."""
        ...


class FrozenBase(Protocol):
    """Where the bytes come from with which stores and ends are filled: the frozen cache."""

    def __len__(self) -> int:
        """How many layers there are."""
        ...

    def read(self, layer: int, into: Tensor, offset_bytes: int = 0) -> None:
        """Fill ``into`` uint8 (n,), host memory, with n bytes of the layer from ``offset_bytes``
        on.
        """
        ...

    def checksum(self, layer: int) -> int | None:
        """What ``quant.checksum`` makes of the whole layer; None: nobody knows."""
        ...

    def path(self, layer: int) -> Path:
        """Where the layer lies on disk."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        ...

    def read_end(self, name: str, into: Tensor) -> None:
        """Fill ``into``, contiguous and in host memory, with the ``embedding`` (V, C), the
        ``final_norm`` (C,) or the ``head`` (V, C).
        """
        ...
