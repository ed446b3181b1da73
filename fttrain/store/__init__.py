"""Stores of the frozen base, layer by layer.

A store brings layers before they are needed and hands them out until they are released:
``prefetch(upcoming)``, ``get(l)``, ``release(l)``. Schedules use nothing else of it.
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
    """Bytes that this rank moved for its layers since the last ``take_traffic``, and seconds for
    which the compute waited for them.

    Traffic of ``layer_inputs=host``, ``embedding=host`` and ``optim.offload`` between host and
    device and the reduction of gradients are not counted.
    """

    gather_bytes: int = 0  # shards of frozen layers, received from other ranks
    h2d_bytes: int = 0  # frozen layers and a streamed head, copied from host memory to the device
    stage_bytes: int = 0  # boundaries and their gradients, sent to other stages of a pipeline
    activation_bytes: int = 0  # offloaded activations that came back from host memory
    # Seconds in which the compute waited for a frozen layer, a streamed head, offloaded
    # activations, or the boundary or gradient of another stage. On CUDA only waits count that were
    # over when ``take_traffic`` was called.
    wait_s: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        """The sum over two components of a rank that run one after the other."""
        return Traffic(*map(add, astuple(self), astuple(other)))


class Store(Protocol):
    """The part of a store that a schedule uses."""

    def __len__(self) -> int:
        """The number of layers."""
        ...

    def prefetch(self, upcoming: Sequence[int]) -> None:
        """Start bringing the first of ``upcoming``, the next layers in the order of their use, as
        many as there is room for.
        """
        ...

    def get(self, layer: int) -> FrozenLayer:
        """The layer's frozen tensors, valid until ``release``."""
        ...

    def release(self, layer: int) -> None:
        """Allow the layer's bytes to be overwritten after the work issued to the device so far."""
        ...

    def take_traffic(self) -> Traffic:
        """The traffic since the last call."""
        ...


class FrozenBase(Protocol):
    """The source of the bytes of stores, embedding and head: the frozen cache."""

    def __len__(self) -> int:
        """The number of layers."""
        ...

    def read(self, layer: int, into: Tensor, offset_bytes: int = 0) -> None:
        """Fill ``into`` uint8 (n,), host memory, with n bytes of the layer from ``offset_bytes``
        on.
        """
        ...

    def checksum(self, layer: int) -> int | None:
        """The ``quant.checksum`` of the whole layer; None: not known."""
        ...

    def path(self, layer: int) -> Path:
        """The layer's file."""
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
