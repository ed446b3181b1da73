"""What this machine is, and how a rank sets itself up on it."""

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fttrain.dist import local_world_size, rank_from_environment
from fttrain.errors import UserError

BACKENDS = ("auto", "nccl", "gloo")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


@dataclass(frozen=True)
class RigConfig:
    """Where the ranks compute."""

    device: str = "auto"  # auto (a GPU a rank if there is one) | cpu | cuda
    threads: int | None = None  # CPU threads of a rank; None: cores / ranks of this machine
    # how ranks talk: auto (nccl between GPUs, gloo between CPUs) | nccl | gloo (also between GPUs,
    # through host memory; ranks may share a GPU)
    backend: str = "auto"
    # what `fttrain plan` reckons with: measured (by `fttrain measure`, on this machine) | a name in
    # conf/rig/profiles/ | path of a profile
    profile: str = "measured"

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"rig.device={self.device}: auto, cpu or cuda")
        if self.backend not in BACKENDS:
            raise UserError(f"rig.backend={self.backend}: {', '.join(BACKENDS)}")
        if (self.device, self.backend) == ("cpu", "nccl"):
            raise UserError("rig.backend=nccl: it needs a GPU; rig.device=cpu goes with gloo")
        if not self.profile:
            raise UserError("rig.profile is empty: measured, the name of a rig, or a path")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"rig.threads={self.threads}: a whole number of 1 or more, or null")


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
    """The most resident memory this process has had."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch's allocator, on the device or of the CPU, could not give what was asked."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


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
    ranks = -(-local_world_size // torch.cuda.device_count())  # on this GPU
    return int(min(free / ranks, capped - torch.cuda.memory_reserved(device)))


def _cgroup_rooms() -> list[int]:
    """Limit less use of each control group (version 2) that this process is in; page cache that the
    kernel can drop does not count as used.
    """
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    path = next((line.split("::", 1)[1] for line in own if line.startswith("0::")), "/")
    rooms = []
    folder = Path("/sys/fs/cgroup") / path.lstrip("/")
    for level in (folder, *folder.parents):
        try:
            limit = (level / "memory.max").read_text().strip()
            used = int((level / "memory.current").read_text())
            stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # the root group has no limit; version 1 no such files
        if limit != "max":
            rooms.append(int(limit) - used + int(stat.get("inactive_file", 0)))
    return rooms


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
