"""Layer inputs (activation checkpoints) that wait for backward: on the device, or in host memory.

With host memory the input of each (layer, micro-batch) is copied out as the next layer computes and
copied back just before its backward. At most two copies are under way in each direction, so the
device never holds more than a few layer inputs.

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
    """Storage that holds what ``save`` is given until ``load`` returns it, once."""

    def save(self, hidden: Tensor) -> Any:
        """Store ``hidden`` (N, C). Return the key for ``prefetch`` and ``load``."""
        ...

    def prefetch(self, saved: Any) -> None:
        """Start bringing ``saved`` to the device: its ``load`` comes next."""
        ...

    def load(self, saved: Any) -> Tensor:
        """The layer input (N, C) on the device; its slot is free again."""
        ...

    def discard(self) -> None:
        """Free all slots: what is saved will not be loaded."""
        ...

    def resize(self, pieces: int) -> None:
        """Divide each slot into ``pieces``: layer inputs have 1 / ``pieces`` of the rows from here
        on. Nothing may be saved at the time.
        """
        ...


class DeviceLayerInputs:
    """Layer inputs that stay on the device."""

    def save(self, hidden: Tensor) -> Tensor:
        return hidden

    def prefetch(self, saved: Tensor) -> None:
        """Do nothing: the input is there."""

    def load(self, saved: Tensor) -> Tensor:
        return saved

    def discard(self) -> None:
        """Do nothing: the caller's references alone hold the inputs."""

    def resize(self, pieces: int) -> None:
        """Do nothing: no memory is reserved."""


@dataclass
class _SavedInput:
    """One layer input in host memory."""

    slot: int
    rows: int  # N
    copy_back: tuple[Handle, Tensor] | None = None  # host -> device; (N, C)


class HostLayerInputs:
    """Layer inputs in host memory. ``buffer``: uint8, of ``layer_input_bytes(shape, dtype)``;
    ``shape``: (slots, most tokens of a micro-batch, C).
    """

    def __init__(
        self,
        buffer: Tensor,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        out: SideStream | None = None,
        back: SideStream | None = None,
    ) -> None:
        self._host = buffer.view(dtype).view(shape)  # (slots, rows, C)
        self._device = device
        self._free = list(range(len(self._host)))
        self._out, self._back = out or copy_stream(device), back or copy_stream(device)
        self._leaving: deque[tuple[Handle, Tensor]] = deque()  # copies out, and what they read

    def save(self, hidden: Tensor) -> _SavedInput:
        saved = _SavedInput(self._free.pop(), len(hidden))
        while len(self._leaving) >= UNDER_WAY:
            self._leaving.popleft()[0].wait()  # its device memory is free from here on
        on_host = self._host[saved.slot, : saved.rows]  # (N, C)
        handle = self._out.run(partial(copy, on_host, hidden))
        self._leaving.append((handle, hidden))
        return saved

    def prefetch(self, saved: _SavedInput) -> None:
        if saved.copy_back is not None:
            return
        while self._leaving:  # the last copies out may not be complete
            self._leaving.popleft()[0].wait()
        on_host = self._host[saved.slot, : saved.rows]  # (N, C)
        hidden = torch.empty(on_host.shape, dtype=on_host.dtype, device=self._device)
        handle = self._back.run(partial(copy, hidden, on_host))
        saved.copy_back = handle, hidden

    def load(self, saved: _SavedInput) -> Tensor:
        self.prefetch(saved)
        assert saved.copy_back is not None
        handle, hidden = saved.copy_back
        handle.wait()
        saved.copy_back = None
        self._free.append(saved.slot)
        return hidden

    def discard(self) -> None:
        # Host slots and device memory that a copy still uses must not be given out again.
        self._out.synchronize()
        self._back.synchronize()
        self._leaving.clear()
        self._free = list(range(len(self._host)))

    def resize(self, pieces: int) -> None:
        slots, rows, width = self._host.shape
        self._host = self._host.view(slots * pieces, rows // pieces, width)
        self._free = list(range(len(self._host)))


def layer_input_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes of host memory for layer inputs (slots, rows, C)."""
    slots, rows, width = shape
    return slots * rows * width * dtype.itemsize
