"""One card as torch numbers it, for questions to its driver."""

import os
from typing import Any

import pynvml
import torch

from fttrain.distributed.rank_group import local_world_size
from fttrain.memory.device import ranks_a_device
from fttrain.rig.nvml import ask


def handle_of(device: torch.device) -> Any:
    """By its UUID: torch's numbers may be others than the driver's."""
    if device.type != "cuda":
        return None
    return ask(lambda: pynvml.nvmlDeviceGetHandleByUUID(uuid_of(device)))


def uuid_of(device: torch.device) -> str:
    """Of a GPU, as the driver and nvidia-smi write it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def own_bytes(device: torch.device) -> int | None:
    """What the driver counts of ``device``'s memory as this process's; None, too, in containers
    that hide processes from the driver.
    """
    handle = handle_of(device)
    if handle is None:
        return None
    running = ask(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    return next((found.usedGpuMemory for found in running if found.pid == os.getpid()), None)


def beside_allocator_bytes(device: torch.device, taken_bytes: int = 0) -> int:
    """What this process takes of ``device`` besides torch's allocator: context, kernels that were
    loaded, buffers of NCCL.

    ``taken_bytes``: of the card, by all programs, before the process was there. It matters where
    the driver does not know the process: then all that came since counts, divided among the ranks
    of the card, which have to be equally far.
    """
    own = own_bytes(device)
    if own is None:
        free, total = torch.cuda.mem_get_info(device)
        own = (total - free - taken_bytes) // ranks_a_device(device, local_world_size())
    return own - torch.cuda.memory_reserved(device)


def others_bytes(device: torch.device) -> int | None:
    """What other programs hold of ``device``, a display for one; None where the driver does not
    know this process, and where ranks share the card.
    """
    own = own_bytes(device)
    if own is None or ranks_a_device(device, local_world_size()) > 1:
        return None
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - own)
