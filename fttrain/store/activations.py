"""What a layer's backward reads, in host memory between its forward and its backward.

autograd hands over each tensor that it would keep; it leaves for the host while the next layers
compute and is back on the device when backward asks for it. What has not been pushed out by later
ones when forward turns into backward is still on the device, and is used from there.

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
ALIGN_BYTES = 256  # of a tensor's start: what kernels like


@dataclass
class _Part:
    """Where one tensor lies in its place."""

    start: int  # bytes from the start of the place
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.shape.numel() * self.dtype.itemsize

    def of(self, flat: Tensor) -> Tensor:
        """The tensor in ``flat`` uint8 (bytes of the place,)."""
        return flat[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass
class OffloadedPass:
    """The tensors of one layer's pass of one micro-batch."""

    place: int
    parts: list[_Part] = field(default_factory=list)
    tensors: list[Tensor] | None = field(default_factory=list)  # None: on the host alone
    left: list[Handle] = field(default_factory=list)
    coming: tuple[Handle, Tensor] | None = None  # uint8 (used bytes of the place,)

    @property
    def used_bytes(self) -> int:
        return self.parts[-1].end if self.parts else 0


class HostActivations:
    """``buffer``: host memory, uint8, for ``places`` passes of a layer at once."""

    def __init__(
        self,
        buffer: Tensor,
        places: int,
        device: torch.device,
        out: SideStream | None = None,
        back: SideStream | None = None,
    ) -> None:
        self._host = buffer.view(places, -1)
        self._device = device
        self._free = list(range(places))
        self._out, self._back = out or copy_stream(device), back or copy_stream(device, timed=True)
        self._leaving: deque[OffloadedPass] = deque()  # those whose tensors are still on the device
        self._back_bytes = 0

    @contextmanager
    def taking(self) -> Iterator[OffloadedPass]:
        """Take what autograd keeps inside the block; backward of it runs between ``bring`` and
        ``drop``.
        """
        kept = OffloadedPass(self._free.pop())
        with saved_tensors_hooks(partial(self._pack, kept), partial(self._unpack, kept)):
            yield kept
        self._leaving.append(kept)
        while len(self._leaving) > UNDER_WAY:
            gone = self._leaving.popleft()
            HandleGroup(gone.left).wait()  # its device memory is free from here on
            gone.tensors = None

    def bring(self, kept: OffloadedPass) -> None:
        """It is needed next: start its way back, unless it is under way or still there."""
        if kept.tensors is not None or kept.coming is not None:
            return
        on_host = self._host[kept.place, : kept.used_bytes]
        flat = torch.empty_like(on_host, device=self._device)

        def work() -> None:
            HandleGroup(kept.left).wait()
            copy(flat, on_host)

        kept.coming = self._back.run(work), flat
        self._back_bytes += kept.used_bytes

    def drop(self, kept: OffloadedPass) -> None:
        """Its backward is issued."""
        if kept.tensors is not None:
            # A copy may read them still, and what comes into their memory: nobody reads its place.
            self._leaving.remove(kept)
        kept.tensors = kept.coming = None
        self._free.append(kept.place)

    def discard(self) -> None:
        """No backward of what was taken will come: all places are free again."""
        # A place, and memory of the device, that a copy still uses must not be given out again.
        self._out.synchronize()
        self._back.synchronize()
        self._leaving.clear()
        self._free = list(range(len(self._host)))

    def resize(self, pieces: int) -> None:
        """Passes have 1 / ``pieces`` of the rows from here on, and there are as many times more of
        them. Nothing is kept now.
        """
        self._host = self._host.view(len(self._host) * pieces, -1)
        self._free = list(range(len(self._host)))

    def take_traffic(self) -> Traffic:
        """What came back to the device since the last call, and the waits for it."""
        moved, self._back_bytes = self._back_bytes, 0
        return Traffic(activation_bytes=moved, wait_s=self._back.take_wait_s())

    def _pack(self, kept: OffloadedPass, tensor: Tensor) -> tuple[int, torch.Size]:
        """Which tensor of ``kept`` it is, and its shape: two nodes may keep views of the same."""
        assert kept.tensors is not None
        for number, earlier in enumerate(kept.tensors):
            if _begins(earlier) == _begins(tensor) and earlier.nbytes == tensor.nbytes:
                return number, tensor.shape
        start = round_up(kept.used_bytes, ALIGN_BYTES)
        part = _Part(start, tensor.shape, tensor.dtype)
        kept.parts.append(part)
        kept.tensors.append(tensor.detach())
        on_host = part.of(self._host[kept.place])
        kept.left.append(self._out.run(partial(copy, on_host, kept.tensors[-1])))
        return len(kept.parts) - 1, tensor.shape

    def _unpack(self, kept: OffloadedPass, packed: tuple[int, torch.Size]) -> Tensor:
        number, shape = packed
        if kept.tensors is not None:
            return kept.tensors[number].view(shape)
        self.bring(kept)
        assert kept.coming is not None
        arrival, flat = kept.coming
        arrival.wait()
        return kept.parts[number].of(flat).view(shape)


def _begins(tensor: Tensor) -> tuple[int, int]:
    """Where it begins: storage, bytes from its start. Fake tensors have no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.itemsize
