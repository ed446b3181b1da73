"""Activation offload: tensors that a layer's backward reads wait in host memory meanwhile.

autograd hands over each tensor that it saves for backward. The tensor is copied to the host while
the next layers compute, and copied back before backward reads it. The tensors of the last
``UNDER_WAY`` passes stay on the device, and backward uses them from there.

    forward    layer 0   layer 1   layer 2 | layer 2   layer 1   layer 0    backward
    out            [ 0 ------ ][ 1 ---- ]
    back                                       [ 1 ------ ][ 0 ---- ]
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fttrain.distributed.collectives import Handle, HandleGroup
from fttrain.store import Traffic
from fttrain.store.side_stream import SideStream, copy, copy_stream
from fttrain.util.units import round_up

UNDER_WAY = 2  # passes whose tensors stay on the device while they leave
ALIGN_BYTES = 256  # alignment of each tensor's start: kernels are faster on it


@dataclass
class _Part:
    """The bytes of one tensor in the host slot of its pass."""

    start: int  # bytes from the start of the slot
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.shape.numel() * self.dtype.itemsize

    def of(self, flat: Tensor) -> Tensor:
        """The tensor in ``flat`` uint8 (slot bytes,)."""
        return flat[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass
class OffloadedPass:
    """The saved tensors of one layer's pass of one micro-batch."""

    slot: int  # row of the host buffer
    parts: list[_Part] = field(default_factory=list)
    tensors: list[Tensor] | None = field(default_factory=list)  # None: in host memory alone
    copies_out: list[Handle] = field(default_factory=list)  # device -> host, one a tensor
    copy_back: tuple[Handle, Tensor] | None = None  # host -> device; uint8 (used_bytes,)

    @property
    def used_bytes(self) -> int:
        return self.parts[-1].end if self.parts else 0


class HostActivations:
    """``buffer``: host memory, uint8, divided into ``slots``, one a layer's pass."""

    def __init__(
        self,
        buffer: Tensor,
        slots: int,
        device: torch.device,
        out: SideStream | None = None,
        back: SideStream | None = None,
    ) -> None:
        self._host = buffer.view(slots, -1)  # uint8 (slots, slot bytes)
        self._device = device
        self._free = list(range(slots))
        self._out, self._back = out or copy_stream(device), back or copy_stream(device, timed=True)
        self._leaving: deque[OffloadedPass] = deque()  # passes with tensors still on the device
        self._back_bytes = 0

    @contextmanager
    def offload(self) -> Iterator[OffloadedPass]:
        """Offload all that autograd saves inside the block. Its backward runs between ``bring``
        and ``drop``.
        """
        saved = OffloadedPass(self._free.pop())
        with saved_tensors_hooks(partial(self._pack, saved), partial(self._unpack, saved)):
            yield saved
        self._leaving.append(saved)
        while len(self._leaving) > UNDER_WAY:
            oldest = self._leaving.popleft()
            HandleGroup(oldest.copies_out).wait()  # its device memory is free from here on
            oldest.tensors = None

    def bring(self, saved: OffloadedPass) -> None:
        """Start the copy back to the device, unless it has started or the tensors are still
        there.
        """
        if saved.tensors is not None or saved.copy_back is not None:
            return
        on_host = self._host[saved.slot, : saved.used_bytes]
        flat = torch.empty_like(on_host, device=self._device)  # uint8 (used_bytes,)

        def copy_back() -> None:
            HandleGroup(saved.copies_out).wait()
            copy(flat, on_host)

        saved.copy_back = self._back.run(copy_back), flat
        self._back_bytes += saved.used_bytes

    def drop(self, saved: OffloadedPass) -> None:
        """Free the pass, whose backward is issued."""
        if saved.tensors is not None:
            # A copy out may still read their memory after it is used again. Its slot then holds
            # garbage that no backward reads.
            self._leaving.remove(saved)
        saved.tensors = saved.copy_back = None
        self._free.append(saved.slot)

    def discard(self) -> None:
        """Free all slots: the backward of what was saved will not come."""
        # Host slots and device memory that a copy still uses must not be given out again.
        self._out.synchronize()
        self._back.synchronize()
        self._leaving.clear()
        self._free = list(range(len(self._host)))

    def resize(self, pieces: int) -> None:
        """Divide each slot into ``pieces``: micro-batches have 1 / ``pieces`` of the rows from here
        on. Nothing may be saved at the time.
        """
        self._host = self._host.view(len(self._host) * pieces, -1)
        self._free = list(range(len(self._host)))

    def take_traffic(self) -> Traffic:
        """Bytes copied back to the device since the last call, and the seconds waited for them."""
        moved, self._back_bytes = self._back_bytes, 0
        return Traffic(activation_bytes=moved, wait_s=self._back.take_wait_s())

    def _pack(self, saved: OffloadedPass, tensor: Tensor) -> tuple[int, torch.Size]:
        """The tensor's number in ``saved``, and its shape: two autograd nodes may save views of the
        same memory, which is copied once.
        """
        assert saved.tensors is not None
        for number, earlier in enumerate(saved.tensors):
            if _begins(earlier) == _begins(tensor) and earlier.nbytes == tensor.nbytes:
                return number, tensor.shape
        start = round_up(saved.used_bytes, ALIGN_BYTES)
        part = _Part(start, tensor.shape, tensor.dtype)
        saved.parts.append(part)
        saved.tensors.append(tensor.detach())
        on_host = part.of(self._host[saved.slot])
        saved.copies_out.append(self._out.run(partial(copy, on_host, saved.tensors[-1])))
        return len(saved.parts) - 1, tensor.shape

    def _unpack(self, saved: OffloadedPass, packed: tuple[int, torch.Size]) -> Tensor:
        number, shape = packed
        if saved.tensors is not None:
            return saved.tensors[number].view(shape)
        self.bring(saved)
        assert saved.copy_back is not None
        handle, flat = saved.copy_back
        handle.wait()
        return saved.parts[number].of(flat).view(shape)


def _begins(tensor: Tensor) -> tuple[int, int]:
    """The tensor's storage, and its offset in bytes: fake tensors have no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.itemsize
