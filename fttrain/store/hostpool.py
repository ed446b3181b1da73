"""The one place that allocates big host buffers: booked, compared with what the machine has, made.

    book("frozen layers", 35 GB, shared)   book("boundaries", 5 GB) ...  -> check() -> allocate()

Booking comes before anything is loaded, so a run that does not fit ends at once, with figures. A
shared buffer exists once for all ranks of a machine: an anonymous file in memory (memfd; /dev/shm
is half of the RAM, and 64 MB in containers) that every rank maps. On CUDA all buffers are
page-locked, so that copies run beside the compute.
"""

import mmap
import os
import sys
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.dist import Group
from fttrain.errors import UserError
from fttrain.rig.probe import available_host_bytes
from fttrain.units import MIB, duration, gib

REGISTER_BYTES = 256 * MIB  # page-locked in pieces of this size: progress, and a limit that holds
REGISTER_LIMIT_S = 600.0  # 1 GiB takes about 0.3 s; a machine that swaps takes forever


@dataclass(frozen=True)
class _Booking:
    size_bytes: int
    shared: bool  # once for all ranks of the machine


class HostPool:
    """All big host buffers of one rank. Every rank makes the same calls in the same order."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._bookings: dict[str, _Booking] = {}

    def book(self, what: str, size_bytes: int, shared: bool = False) -> None:
        """Say that ``what`` will take so many bytes; ``shared``: once for all ranks."""
        self._bookings[what] = _Booking(size_bytes, shared)

    def check(self) -> None:
        """Raises UserError, on all ranks alike, where the machine has too little memory free."""
        own = sum(b.size_bytes for b in self._bookings.values() if not b.shared)
        # The ranks share this machine, but maybe not their settings: each may keep other layers.
        all_own = self._group.sum(own)
        needed = all_own + sum(b.size_bytes for b in self._bookings.values() if b.shared)
        available = self._group.minimum(available_host_bytes())
        if needed <= available:
            return
        ranks = self._group.world_size
        parts = ", ".join(
            f"{what} {gib(booking.size_bytes)}"
            + ("" if ranks == 1 else " in all" if booking.shared else f" on each of {ranks} ranks")
            for what, booking in self._bookings.items()
        )
        raise UserError(
            f"host memory: {gib(needed)} are needed ({parts}), {gib(available)} are available; "
            "a smaller schedule.group, boundaries=device, strategy.resident_layers nearer to all, "
            "or closing other programs helps"
        )

    def allocate(self, what: str) -> Tensor:
        """The buffer that was booked as ``what``: uint8 (size_bytes,), zero; page-locked on CUDA.

        Raises UserError where the system refuses it.
        """
        booking = self._bookings[what]
        map_ = self._map_shared if booking.shared else self._map_own
        buffer = torch.frombuffer(map_(what, booking.size_bytes), dtype=torch.uint8)
        if self._group.device.type == "cuda":
            _page_lock(buffer, what, speak=self._group.is_main)
        return buffer

    def _map_own(self, what: str, size_bytes: int) -> mmap.mmap:
        try:
            return mmap.mmap(-1, size_bytes)
        except (OSError, ValueError) as error:
            raise UserError(_refused(what, size_bytes, error)) from error

    def _map_shared(self, what: str, size_bytes: int) -> mmap.mmap:
        """An anonymous file of rank 0, which all ranks map, or none."""
        problem, descriptor = "", -1
        if self._group.is_main:
            descriptor = os.memfd_create(f"fttrain {what}", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size_bytes)
        place = self._group.share(f"/proc/{os.getpid()}/fd/{descriptor}")
        try:
            if not self._group.is_main:
                descriptor = os.open(place, os.O_RDWR | os.O_CLOEXEC)
            memory = mmap.mmap(descriptor, size_bytes)
        except (OSError, ValueError) as error:
            problem = _refused(what, size_bytes, error)
        self._group.refuse_together(problem)  # rank 0's descriptor stays until all have opened it
        os.close(descriptor)
        return memory


def _refused(what: str, size_bytes: int, error: Exception) -> str:
    return f"host memory: {what}: the system refused {gib(size_bytes)} ({error})"


def _page_lock(buffer: Tensor, what: str, speak: bool) -> None:
    """Register ``buffer`` with CUDA, piece by piece. Where that fails copies still work, slower."""
    runtime, started, told = torch.cuda.cudart(), time.monotonic(), time.monotonic()
    for begin in range(0, buffer.numel(), REGISTER_BYTES):
        piece = buffer[begin : begin + REGISTER_BYTES]
        code = int(runtime.cudaHostRegister(piece.data_ptr(), piece.numel(), 0))
        now = time.monotonic()
        if code or now - started > REGISTER_LIMIT_S:
            reason = f"cudaHostRegister answered {code}" if code else "it took too long"
            warnings.warn(
                f"{what}: only {gib(begin)} of {gib(buffer.numel())} could be page-locked "
                f"({reason}); copies of the rest go through the driver's own bounce buffer, at "
                f"{_copy_rate(piece) / 1e9:.1f} GB/s",
                stacklevel=2,
            )
            return
        if speak and now - told > 5:
            told = now
            left_s = (now - started) / (begin + piece.numel()) * (buffer.numel() - begin)
            print(
                f"page-locking {what}: {gib(begin)} of {gib(buffer.numel())}, "
                f"{duration(left_s)} left",
                file=sys.stderr,
                flush=True,
            )


def _copy_rate(piece: Tensor) -> float:
    """Bytes a second of a copy of ``piece`` to the device."""
    piece.to("cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    piece.to("cuda")
    torch.cuda.synchronize()
    return piece.numel() / (time.perf_counter() - started)
