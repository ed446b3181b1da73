"""One card as torch numbers it, for questions to its driver."""

import os
from typing import Any

import pynvml
import torch

from fttrain.distributed.rank_group import local_world_size
from fttrain.memory.device import ranks_a_device
from fttrain.rig.nvml import ask


def handle_of(device: torch.device) -> Any:
    """NVML's handle of ``device``, by UUID: torch and the driver may number cards differently."""
    if device.type != "cuda":
        return None
    return ask(lambda: pynvml.nvmlDeviceGetHandleByUUID(uuid_of(device)))


def uuid_of(device: torch.device) -> str:
    """The UUID of a GPU, as the driver and nvidia-smi write it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def device_process_bytes(device: torch.device) -> int | None:
    """Bytes of ``device`` that the driver counts for this process; None where it does not, as in
    containers that hide processes.
    """
    handle = handle_of(device)
    if handle is None:
        return None
    running = ask(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    return next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)


def beside_allocator_bytes(device: torch.device, taken_bytes: int = 0) -> int:
    """Bytes of this process on ``device`` outside torch's allocator: context, loaded kernels,
    buffers of NCCL.

    ``taken_bytes``: bytes used on the card by all programs before the process started. They matter
    where the driver does not know the process: then the growth since counts, divided among the
    ranks of the card, all of which must be at the same point.
    """
    process_bytes = device_process_bytes(device)
    if process_bytes is None:
        free, total = torch.cuda.mem_get_info(device)
        process_bytes = (total - free - taken_bytes) // ranks_a_device(device, local_world_size())
    return process_bytes - torch.cuda.memory_reserved(device)


def others_bytes(device: torch.device) -> int | None:
    """Bytes of other programs on ``device``, such as a display; None where the driver does not know
    this process, and where ranks share the card.
    """
    process_bytes = device_process_bytes(device)
    if process_bytes is None or ranks_a_device(device, local_world_size()) > 1:
        return None
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - process_bytes)
