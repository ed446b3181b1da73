"""What this machine is, and how a rank sets itself up on it."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import psutil
import torch

from fttrain.distributed.rank_group import local_world_size, rank_from_environment
from fttrain.rig.config import RigConfig
from fttrain.util.errors import UserError

CGROUPS = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
# What errors say that are no torch.OutOfMemoryError: torch's allocator of the CPU; cuBLAS, which
# makes a handle at its first use on a thread, and names either reason; the driver, of its calls and
# of mapping segments; NCCL, whose buffers come with the first use of a connection
_RAN_OUT = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "'out of memory'",
)


def set_up_rank(config: RigConfig) -> torch.device:
    """``set_up`` for this process, as its launcher placed it."""
    _, _, local_rank = rank_from_environment()
    return set_up(config, local_rank, local_world_size())


def set_up(config: RigConfig, local_rank: int, local_world_size: int) -> torch.device:
    """Choose this rank's device and prepare the process for it.

    Raises UserError where the device that was asked for is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.backend == "nccl" and not gpus:
        raise UserError("rig.backend=nccl: this machine has no GPU; rig.backend=auto takes gloo")
    shared = config.backend == "gloo"  # NCCL refuses two ranks on one GPU
    if shared and gpus:
        local_rank %= gpus
    if config.device == "cuda" and gpus <= local_rank:
        raise UserError(
            f"rig.device=cuda: rank {local_rank} of this machine needs GPU {local_rank}, there are "
            f"{gpus}; "
            "rig.device=cpu or fewer launch.processes help"
        )
    if config.device != "cpu" and not shared and 0 < gpus < local_world_size:
        raise UserError(
            f"launch.processes={local_world_size}: this machine has {gpus} GPU; a rank needs one "
            "of its own, but for rig.backend=gloo, which lets them share"
        )
    threads = (
        config.threads
        or int(os.environ.get("OMP_NUM_THREADS", 0))
        or _share_of_cores(local_world_size)
    )
    torch.set_num_threads(threads)
    if config.device == "cpu" or not gpus:
        _tune_host_arithmetic()
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def peak_host_bytes() -> int:
    """The most resident memory this process has had.

    Linux's getrusage would count what its parent had when it started it, too (getrusage(2) keeps
    the maximum over execve), so the kernel's own mark of this program is read where there is one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if marked := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
        return int(marked[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch's allocator, on the device or of the CPU, could not give what was asked, or
    the driver and its libraries had no room for what they need beside it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _RAN_OUT)


def available_host_bytes() -> int:
    """Memory that programs can still have without swapping: the machine's, or what a control group
    (a container, a batch system) leaves of its limit.
    """
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def free_device_bytes(device: torch.device, local_world_size: int) -> int:
    """Memory that this rank can still have on ``device``: its share, where ranks share it."""
    if device.type != "cuda":
        return available_host_bytes() // local_world_size
    free, total = torch.cuda.mem_get_info(device)
    capped = torch.cuda.get_per_process_memory_fraction(device) * total
    share = free / ranks_a_device(device, local_world_size)
    return int(min(share, capped - torch.cuda.memory_reserved(device)))


def ranks_a_device(device: torch.device, local_world_size: int) -> int:
    """That share ``device``: all of the machine a CPU, of GPUs more than one with ``backend=gloo``
    alone.
    """
    if device.type != "cuda":
        return local_world_size
    return -(-local_world_size // torch.cuda.device_count())


def cgroup_limit_bytes(root: Path = CGROUPS) -> int | None:
    """The least memory that a control group (version 2) which this process is in may take; None
    where none has a limit.
    """
    limits = [_limit_bytes(level) for level in _cgroup_levels(root)]
    return min((limit for limit in limits if limit is not None), default=None)


def _cgroup_rooms() -> list[int]:
    """Limit less use of each control group that this process is in; page cache that the kernel can
    drop does not count as used.
    """
    rooms = []
    for level in _cgroup_levels(CGROUPS):
        try:
            limit = _limit_bytes(level)
            used = int((level / "memory.current").read_text())
            stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # the root group and version 1 have no such files
        if limit is not None:
            rooms.append(limit - used + int(stat.get("inactive_file", 0)))
    return rooms


def _cgroup_levels(root: Path) -> list[Path]:
    """The folders of the control groups (version 2) that this process is in, innermost first."""
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    path = next((line.split("::", 1)[1] for line in own if line.startswith("0::")), "/")
    folder = root / path.lstrip("/")
    return [level for level in (folder, *folder.parents) if level.is_relative_to(root)]


def _limit_bytes(level: Path) -> int | None:
    """Of one control group; None where it has none."""
    try:
        return int((level / "memory.max").read_text())
    except (OSError, ValueError):
        return None  # "max"; the root group and version 1 have no such file


def _share_of_cores(local_world_size: int) -> int:
    cores = psutil.cpu_count(logical=False) or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, usable) // local_world_size)


def _tune_host_arithmetic() -> None:
    """Two settings without which a CPU rank spends much of its time outside arithmetic.

    Values below 1e-38 (softmax over a large vocabulary makes millions) take the processor's slow
    path unless they are flushed to zero. And glibc gives buffers above 32 MB back to the kernel
    after each use, so that every large tensor is paged in anew; keeping them costs no more than the
    peak that was reached anyway.
    """
    torch.set_flush_denormal(True)
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
