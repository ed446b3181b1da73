"""The NVIDIA driver's answers (NVML). None: not available, be it the driver or one figure."""

import ctypes
from collections.abc import Callable
from typing import TypeVar

import pynvml

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
