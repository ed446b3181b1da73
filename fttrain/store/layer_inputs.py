"""Layer inputs that are kept for backward: on the device, or in host memory.

In host memory the boundary of each (layer, micro-batch) goes out as the next layer computes and
comes back just before its backward. Two are under way in each direction at most, so the device
never holds more than a few of them.

Legend: N tokens of a micro-batch, C hidden width.
"""

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fttrain.distributed.collectives import Handle
from fttrain.store.side_stream import SideStream, copy, copy_stream

UNDER_WAY = 2  # copies in each direction


class LayerInputs(Protocol):
    """Keeps what ``save`` is given until ``load`` asks for it, once."""

    def save(self, boundary: Tensor) -> Any:
        """Take ``boundary`` (N, C); what ``prefetch`` and ``load`` know it by."""
        ...

    def prefetch(self, kept: Any) -> None:
        """It is needed next."""
        ...

    def load(self, kept: Any) -> Tensor:
        """The boundary (N, C) on the device; its place is free again."""
        ...

    def discard(self) -> None:
        """What is kept will not be asked for."""
        ...

    def resize(self, pieces: int) -> None:
        """LayerInputs have 1 / ``pieces`` of the rows from here on, and there are as many times
        more of them. Nothing is kept now.
        """
        ...


class DeviceLayerInputs:
    """They stay where they are."""

    def save(self, boundary: Tensor) -> Tensor:
        return boundary

    def prefetch(self, kept: Tensor) -> None:
        """Nothing to bring."""

    def load(self, kept: Tensor) -> Tensor:
        return kept

    def discard(self) -> None:
        """Who saved them holds them."""

    def resize(self, pieces: int) -> None:
        """They are as large as they are."""


@dataclass
class _SavedInput:
    """One boundary in host memory, and on its way back."""

    place: int
    rows: int  # N
    coming: tuple[Handle, Tensor] | None = None


class HostLayerInputs:
    """``buffer``: host memory for ``places`` boundaries of up to ``rows`` tokens each, uint8."""

    def __init__(
        self,
        buffer: Tensor,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        out: SideStream | None = None,
        back: SideStream | None = None,
    ) -> None:
        self._host = buffer.view(dtype).view(shape)  # (places, rows, C)
        self._device = device
        self._free = list(range(len(self._host)))
        self._out, self._back = out or copy_stream(device), back or copy_stream(device)
        self._leaving: deque[tuple[Handle, Tensor]] = deque()

    def save(self, boundary: Tensor) -> _SavedInput:
        kept = _SavedInput(self._free.pop(), len(boundary))
        while len(self._leaving) >= UNDER_WAY:
            self._leaving.popleft()[0].wait()  # its device memory is free from here on
        place = self._host[kept.place, : kept.rows]
        leaving = self._out.run(partial(copy, place, boundary))
        self._leaving.append((leaving, boundary))
        return kept

    def prefetch(self, kept: _SavedInput) -> None:
        if kept.coming is not None:
            return
        while self._leaving:  # the last ones may not have arrived yet
            self._leaving.popleft()[0].wait()
        place = self._host[kept.place, : kept.rows]
        boundary = torch.empty(place.shape, dtype=place.dtype, device=self._device)
        coming = self._back.run(partial(copy, boundary, place))
        kept.coming = coming, boundary

    def load(self, kept: _SavedInput) -> Tensor:
        self.prefetch(kept)
        assert kept.coming is not None
        coming, boundary = kept.coming
        coming.wait()
        kept.coming = None
        self._free.append(kept.place)
        return boundary

    def discard(self) -> None:
        # A place, and memory of the device, that a copy still uses must not be given out again.
        self._out.synchronize()
        self._back.synchronize()
        self._leaving.clear()
        self._free = list(range(len(self._host)))

    def resize(self, pieces: int) -> None:
        places, rows, width = self._host.shape
        self._host = self._host.view(places * pieces, rows // pieces, width)
        self._free = list(range(len(self._host)))


def layer_input_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Host memory for (places, rows, C)."""
    places, rows, width = shape
    return places * rows * width * dtype.itemsize
