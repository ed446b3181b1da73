"""What the NVIDIA driver says of cards and their links (NVML). None: not available.

A machine without a driver, a driver without some figure, a container that hides it: all the same
None, one figure at a time.
"""

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml
import torch

T = TypeVar("T")
_ALL_LINKS = 0xFFFFFFFF  # scope of a counter: the sum over a card's links
_KIB = 1024


def driver_version() -> str | None:
    """Of the NVIDIA driver."""
    return _ask(lambda: str(pynvml.nvmlSystemGetDriverVersion()))


def facts(device: torch.device) -> dict[str, Any]:
    """Those fields of ``CardProfile`` that the driver knows, by name.

    PCIe generation and width are those of this moment: a card that rests turns its link down, so
    ask while it works. What card and slot can do together is ``*_most``.
    """
    handle = _handle(device)
    if handle is None:
        return {}
    found: dict[str, Any] = {
        "pcie_generation": _ask(lambda: pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
        "pcie_generation_most": _ask(lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        "pcie_width": _ask(lambda: pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        "pcie_width_most": _ask(lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        "nvlink_lanes": _nvlink_lanes(handle),
        "numa_node": _ask(lambda: pynvml.nvmlDeviceGetNumaNodeId(handle)),
        "power_limit_w": _ask(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
        "peer_access": _peer_access(device),
    }
    return found


def nvlink_bytes(device: torch.device) -> int | None:
    """Payload that the card has sent and received over NVLink since the driver began to count."""
    handle = _handle(device)
    if handle is None:
        return None
    fields = [
        (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _ALL_LINKS),
        (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, _ALL_LINKS),
    ]
    values = _ask(lambda: pynvml.nvmlDeviceGetFieldValues(handle, fields))
    if values is None or any(value.nvmlReturn != pynvml.NVML_SUCCESS for value in values):
        return None
    return sum(int(value.value.ullVal) for value in values) * _KIB


def _handle(device: torch.device) -> Any:
    """By its UUID: torch's numbers may be others than the driver's."""
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    return _ask(lambda: pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))


def _nvlink_lanes(handle: Any) -> int | None:
    """Links that are up; 0 for a card that has none."""

    def is_up(link: int) -> bool | None:
        return _ask(lambda: bool(pynvml.nvmlDeviceGetNvLinkState(handle, link)))

    # A card refuses the number of a link that it does not have.
    states = [is_up(link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)]
    return sum(state for state in states if state)


def _peer_access(device: torch.device) -> bool | None:
    others = [other for other in range(torch.cuda.device_count()) if other != device.index]
    if not others:
        return None
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)


def _ask(question: Callable[[], T]) -> T | None:
    """The driver's answer; None where there is no driver or it has none."""
    try:
        pynvml.nvmlInit()  # counts its calls, and costs nothing after the first
        return question()
    except (pynvml.NVMLError, OSError, AttributeError, ctypes.ArgumentError):
        return None
