"""Queries to the NVIDIA driver (NVML). None: not available, be it the driver or one figure."""

import ctypes
from collections.abc import Callable
from typing import TypeVar

import pynvml

T = TypeVar("T")


def ask(query: Callable[[], T]) -> T | None:
    """The result of ``query``; None where there is no driver, or it fails."""
    try:
        pynvml.nvmlInit()  # reference-counted; costs nothing after the first call
        return query()
    except (pynvml.NVMLError, OSError, AttributeError, ctypes.ArgumentError):
        return None


def driver_version() -> str | None:
    """The version of the NVIDIA driver."""
    return ask(lambda: str(pynvml.nvmlSystemGetDriverVersion()))
