"""The one place that allocates big host buffers: booked, compared with what the machine has, made.

    book("frozen layers", 35 GB, shared)   book("boundaries", 5 GB) ...  -> check() -> allocate()

Booking comes before anything is loaded, so a run that does not fit ends at once, with figures. A
shared buffer exists once for all ranks of a machine: an anonymous file in memory (memfd; /dev/shm
is half of the RAM, and 64 MB in containers) that every rank maps. On CUDA all buffers are
page-locked, so that copies run beside the compute: each one whole and in one piece, since a copy
across two registrations may be refused, and one that is page-locked in part is.
"""

import contextlib
import mmap
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup, local_world_size
from fttrain.rig.probe import available_host_bytes, free_device_bytes
from fttrain.util.errors import UserError
from fttrain.util.units import GIB, MIB, gib

PROBE_BYTES = 256 * MIB  # copied to say how fast memory is that is not page-locked
TELL_BYTES = 4 * GIB  # page-locking that much takes seconds: say what is going on


@dataclass(frozen=True)
class Booking:
    """What one part of a run takes."""

    what: str
    size_bytes: int
    place: str  # host | shared (in host memory, once for all ranks of the machine) | device


class HostPool:
    """All big host buffers of one rank, and the books of what it takes on its device.

    Every rank makes the same calls in the same order.
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._bookings: dict[str, Booking] = {}

    @property
    def device(self) -> torch.device:
        """Which computes with what the buffers hold."""
        return self._group.device

    @property
    def free_device_bytes(self) -> int:
        """Memory that this rank can still have on its device."""
        return free_device_bytes(self.device, local_world_size())

    def book(self, what: str, size_bytes: int, shared: bool = False) -> None:
        """Say that ``what`` will take so many bytes; ``shared``: once for a machine's ranks."""
        self._bookings[what] = Booking(what, size_bytes, "shared" if shared else "host")

    def book_device(self, what: str, size_bytes: int) -> None:
        """Say that ``what`` will take so many bytes on the device; of a CPU that is host memory."""
        if size_bytes:
            self._bookings[what] = Booking(what, size_bytes, "device")

    @property
    def bookings(self) -> list[Booking]:
        """All that was booked on this rank."""
        return list(self._bookings.values())

    def check(self) -> None:
        """Raises UserError, on all ranks alike, where a machine has too little memory free."""
        self._check_device()
        self._group.raise_everywhere(self._too_little())

    def _too_little(self) -> str:
        """What to say where this machine has too little host memory. All its ranks call it."""
        machine = self._group.intra_node
        on_host = [b for b in self.bookings if b.place != "device" or self.device.type == "cpu"]
        own = sum(b.size_bytes for b in on_host if b.place != "shared")
        # The ranks share this machine, but maybe not their settings: each may keep other layers.
        all_own = machine.sum(own)
        needed = all_own + sum(b.size_bytes for b in on_host if b.place == "shared")
        available = machine.minimum(available_host_bytes())
        if needed <= available:
            return ""
        parts = ", ".join(f"{b.what} {gib(b.size_bytes)}{self._for_whom(b)}" for b in on_host)
        where = f"machine {self._group.inter_node.rank}: " if machine is not self._group else ""
        return (
            f"{where}host memory: {gib(needed)} are needed ({parts}), {gib(available)} are "
            "available; a smaller schedule.group, data.seq_len or loop.micro_batch_size, "
            "boundaries=device, activations=recompute, strategy.resident_layers nearer to all, or "
            "closing other programs helps"
        )

    def _for_whom(self, booking: Booking) -> str:
        ranks = self._group.intra_node.world_size
        if ranks == 1:
            return ""
        each = f" on each of {ranks} ranks"
        return " in all" if booking.place == "shared" else each

    def _check_device(self) -> None:
        """Refuse a card that cannot hold what is certain; kernels and the allocator add to that."""
        problem = ""
        if self.device.type == "cuda":
            on_device = [booking for booking in self.bookings if booking.place == "device"]
            needed = sum(booking.size_bytes for booking in on_device)
            free = self.free_device_bytes
            if needed > free:
                problem = (
                    f"rank {self._group.rank}: {gib(needed)} are needed on {self.device}, "
                    f"{gib(free)} are free: {largest(on_device)}"
                )
        self._group.raise_everywhere(problem)

    def allocate(self, what: str) -> Tensor:
        """The buffer that was booked as ``what``: uint8 (size_bytes,), zero; page-locked on CUDA.

        Raises UserError where the system refuses it.
        """
        booking = self._bookings[what]
        map_ = self._map_shared if booking.place == "shared" else self._map_own
        memory = map_(what, booking.size_bytes)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        if self._group.device.type == "cuda":
            memory.page_lock(buffer, what, speak=self._group.intra_node.is_main)
        return buffer

    def _map_own(self, what: str, size_bytes: int) -> "Memory":
        try:
            return Memory(-1, size_bytes)
        except (OSError, ValueError) as error:
            raise UserError(_refused(what, size_bytes, error)) from error

    def _map_shared(self, what: str, size_bytes: int) -> "Memory":
        """An anonymous file of the machine's first rank, which all its ranks map, or none."""
        problem, descriptor, machine = "", -1, self._group.intra_node
        try:
            if machine.is_main:
                descriptor = os.memfd_create(f"fttrain {what}", os.MFD_CLOEXEC)
                os.ftruncate(descriptor, size_bytes)
        except OSError as error:
            problem = _refused(what, size_bytes, error)
        place = machine.broadcast_str(f"/proc/{os.getpid()}/fd/{descriptor}")
        try:
            if not machine.is_main:
                descriptor = os.open(place, os.O_RDWR | os.O_CLOEXEC)
            memory = Memory(descriptor, size_bytes)
        except (OSError, ValueError) as error:
            problem = problem or _refused(what, size_bytes, error)
        self._group.raise_everywhere(problem)  # that descriptor stays until all have opened it
        os.close(descriptor)
        return memory


def largest(bookings: Sequence[Booking], count: int = 3) -> str:
    """The ``count`` largest, in words."""
    ordered = sorted(bookings, key=lambda booking: -booking.size_bytes)[:count]
    return ", ".join(f"{booking.what} {gib(booking.size_bytes)}" for booking in ordered)


def _refused(what: str, size_bytes: int, error: Exception) -> str:
    return f"host memory: {what}: the system refused {gib(size_bytes)} ({error})"


class Memory(mmap.mmap):
    """Memory that is no longer page-locked before the system takes it back: what comes to lie at
    its addresses later would pass for page-locked and be copied from where it is not.
    """

    _address = 0  # where it is page-locked
    _device = 0  # for which: the last reference may go on a thread that asks another one

    def page_lock(self, buffer: Tensor, what: str, speak: bool) -> None:
        """Register all of it (``buffer``) with CUDA. Where that fails copies still work, slower."""
        size_bytes = len(buffer)
        if speak and size_bytes >= TELL_BYTES:
            print(f"page-locking {what}: {gib(size_bytes)}", file=sys.stderr, flush=True)
        code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size_bytes, 0))
        if not code:
            self._address, self._device = buffer.data_ptr(), torch.cuda.current_device()
            return
        # The runtime remembers the failure and would blame the next kernel for it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda").add_(1)
        warnings.warn(
            f"{what}: {gib(size_bytes)} could not be page-locked (cudaHostRegister answered "
            f"{code}); copies go through the driver's own bounce buffer, at "
            f"{_copy_rate(buffer[:PROBE_BYTES]) / 1e9:.1f} GB/s, and the compute waits for them",
            stacklevel=2,
        )

    def __del__(self) -> None:
        if self._address and not sys.is_finalizing():
            # A card that has failed answers nothing any more, and has been told of already.
            with contextlib.suppress(RuntimeError), torch.cuda.device(self._device):
                torch.cuda.synchronize()  # copies may be under way
                torch.cuda.cudart().cudaHostUnregister(self._address)


def _copy_rate(piece: Tensor) -> float:
    """Bytes a second of a copy of ``piece`` to the device."""
    piece.to("cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    piece.to("cuda")
    torch.cuda.synchronize()
    return piece.numel() / (time.perf_counter() - started)
