"""Pinned (page-locked) host memory: buffers of one rank, and buffers that a machine's ranks share.

A shared buffer exists once for all ranks of a machine: an anonymous file in memory (memfd; /dev/shm
is half of the RAM, and 64 MB in containers) that every rank maps. On CUDA a buffer is page-locked
whole and in one piece, so that copies run beside the compute: a copy across two registrations may
be refused, and one that is page-locked in part is.
"""

import contextlib
import mmap
import os
import sys
import time

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup
from fttrain.util.errors import UserError
from fttrain.util.units import GIB, MIB, gib
from fttrain.util.warn import Warn, warn_of_rank

PROBE_BYTES = 256 * MIB  # copied to measure the rate of memory that is not page-locked
TELL_BYTES = 4 * GIB  # page-locking takes seconds from here on: print a line first


class HostBuffer(mmap.mmap):
    """Host memory that ends its page-lock before it is unmapped. Memory mapped at the same
    addresses later would pass for page-locked otherwise, and copies would read the wrong pages.
    """

    _address = 0  # of the page-locked memory; 0: not page-locked
    _device = 0  # of the page-lock: the last reference may drop on a thread with another device

    def page_lock(self, buffer: Tensor, what: str, speak: bool, warn: Warn = warn_of_rank) -> None:
        """Register all of it (``buffer``) with CUDA. Where that fails, ``warn`` is called, and
        copies still work, slower.
        """
        size_bytes = len(buffer)
        if speak and size_bytes >= TELL_BYTES:
            print(f"page-locking {what}: {gib(size_bytes)}", file=sys.stderr, flush=True)
        code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size_bytes, 0))
        if not code:
            self._address, self._device = buffer.data_ptr(), torch.cuda.current_device()
            return
        # The runtime keeps the error and would raise it at the next kernel: clear it here.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda").add_(1)
        warn(
            f"{what}: {gib(size_bytes)} could not be page-locked (cudaHostRegister answered "
            f"{code}); copies go through the driver's own bounce buffer, at "
            f"{_copy_rate(buffer[:PROBE_BYTES]) / 1e9:.1f} GB/s, and the compute waits for them"
        )

    def __del__(self) -> None:
        if self._address and not sys.is_finalizing():
            # A failed card raises here as well; its error has been reported already.
            with contextlib.suppress(RuntimeError), torch.cuda.device(self._device):
                torch.cuda.synchronize()  # copies may be in flight
                torch.cuda.cudart().cudaHostUnregister(self._address)


def map_private(label: str, size_bytes: int) -> HostBuffer:
    """Zeroed memory of this rank. ``label`` names it in errors.

    Raises UserError where the system refuses it.
    """
    try:
        return HostBuffer(-1, size_bytes)
    except (OSError, ValueError) as error:
        raise UserError(_refused(label, size_bytes, error)) from error


def map_shared(group: RankGroup, label: str, size_bytes: int) -> HostBuffer:
    """Zeroed memory that all ranks of this rank's machine share: a memfd of the first of them,
    which the others open. Every rank of ``group`` calls it.

    Raises UserError, on every rank, where the system refuses it.
    """
    problem, descriptor, node = "", -1, group.intra_node
    try:
        if node.is_main:
            descriptor = os.memfd_create(f"fttrain {label}", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size_bytes)
    except OSError as error:
        problem = _refused(label, size_bytes, error)
    path = node.broadcast_str(f"/proc/{os.getpid()}/fd/{descriptor}")
    try:
        if not node.is_main:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        memory = HostBuffer(descriptor, size_bytes)
    except (OSError, ValueError) as error:
        problem = problem or _refused(label, size_bytes, error)
    group.raise_everywhere(problem)  # the first rank's descriptor stays until all have opened it
    os.close(descriptor)
    return memory


def _refused(label: str, size_bytes: int, error: Exception) -> str:
    return f"host memory: {label}: the system refused {gib(size_bytes)} ({error})"


def _copy_rate(piece: Tensor) -> float:
    """Bytes a second of a copy of ``piece`` to the device."""
    piece.to("cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    piece.to("cuda")
    torch.cuda.synchronize()
    return piece.numel() / (time.perf_counter() - started)
