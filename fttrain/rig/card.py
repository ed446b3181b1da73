"""One card as torch numbers it, for questions to its driver."""

import os
from typing import Any

import pynvml
import torch

from fttrain.rig.nvml import ask


def handle_of(device: torch.device) -> Any:
    """By its UUID: torch's numbers may be others than the driver's."""
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    return ask(lambda: pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))


def own_bytes(device: torch.device) -> int | None:
    """What the driver counts of ``device``'s memory as this process's; None, too, in containers
    that hide processes from the driver.
    """
    handle = handle_of(device)
    if handle is None:
        return None
    running = ask(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    return next((found.usedGpuMemory for found in running if found.pid == os.getpid()), None)
