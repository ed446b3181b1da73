"""The device of a rank, its threads and the settings of its process."""

import ctypes
import os
import sys

import psutil
import torch

from fttrain.distributed.rank_group import local_world_size, rank_from_environment
from fttrain.launcher.environment import set_deepspeed_variables, set_library_variables
from fttrain.rig.config import RigConfig
from fttrain.util.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def set_up_rank(config: RigConfig, deepspeed: bool = False) -> torch.device:
    """``set_up`` for this process, as its launcher placed it, and the environment variables of the
    libraries that it will import. ``deepspeed``: DeepSpeed is one of them.
    """
    _, _, local_rank = rank_from_environment()
    device = set_up(config, local_rank, local_world_size())
    set_library_variables()
    if deepspeed:
        set_deepspeed_variables(device.type, local_rank)
    return device


def set_up(config: RigConfig, local_rank: int, local_world_size: int) -> torch.device:
    """Choose this rank's device and prepare the process for it.

    Raises UserError where the configured device does not exist.
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


def _share_of_cores(local_world_size: int) -> int:
    cores = psutil.cpu_count(logical=False) or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, usable) // local_world_size)


def _tune_host_arithmetic() -> None:
    """Apply two settings without which a CPU rank spends much of its time outside arithmetic.

    Values below 1e-38 (softmax over a large vocabulary makes millions) take the processor's slow
    path unless they are flushed to zero. glibc returns buffers above 32 MB to the kernel after each
    use, so that every large tensor is paged in again; keeping them costs no more than the peak.
    """
    torch.set_flush_denormal(True)
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
