"""The NVIDIA driver's answers (NVML). None: not available, be it the driver or one figure."""

import ctypes
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml
import torch

T = TypeVar("T")


def ask(question: Callable[[], T]) -> T | None:
    """The driver's answer; None where there is no driver, or it has none."""
    try:
        pynvml.nvmlInit()  # counts its calls, and costs nothing after the first
        return question()
    except (pynvml.NVMLError, OSError, AttributeError, ctypes.ArgumentError):
        return None


def driver_version() -> str | None:
    """Of the NVIDIA driver."""
    return ask(lambda: str(pynvml.nvmlSystemGetDriverVersion()))


def own_bytes(device: torch.device) -> int | None:
    """What the driver counts of ``device``'s memory as this process's; None, too, in containers
    that hide processes from the driver.
    """
    handle = handle_of(device)
    if handle is None:
        return None
    running = ask(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    return next((found.usedGpuMemory for found in running if found.pid == os.getpid()), None)


def handle_of(device: torch.device) -> Any:
    """By its UUID: torch's numbers may be others than the driver's."""
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    return ask(lambda: pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
