"""Cards and their links by the NVIDIA driver (NVML). None: not available.

Each figure is None by itself: without a driver, where the driver lacks it, where a container hides
it.
"""

from pathlib import Path
from typing import Any

import pynvml
import torch

from fttrain.rig.card import handle_of
from fttrain.rig.nvml import ask

_ALL_LINKS = 0xFFFFFFFF  # scope of a counter: the sum over a card's links
_KIB = 1024
PCI_DEVICES = Path("/sys/bus/pci/devices")


def facts(device: torch.device) -> dict[str, Any]:
    """The fields of ``CardProfile`` that the driver provides, by name.

    PCIe generation and width are current values: an idle card turns its link down, so call this
    while it works. ``*_most`` are the limits of card and slot together.
    """
    handle = handle_of(device)
    if handle is None:
        return {}
    figures: dict[str, Any] = {
        "pcie_generation": ask(lambda: pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
        "pcie_generation_most": ask(lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        "pcie_width": ask(lambda: pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        "pcie_width_most": ask(lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        "nvlink_lanes": _nvlink_lanes(handle),
        "numa_node": _numa_node(handle),
        "power_limit_w": ask(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
        "peer_access": _peer_access(device),
    }
    return figures


def nvlink_bytes(device: torch.device) -> int | None:
    """Payload bytes that the card sent and received over NVLink, counted by the driver."""
    handle = handle_of(device)
    if handle is None:
        return None
    fields = [
        (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _ALL_LINKS),
        (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, _ALL_LINKS),
    ]
    values = ask(lambda: pynvml.nvmlDeviceGetFieldValues(handle, fields))
    if values is None or any(value.nvmlReturn != pynvml.NVML_SUCCESS for value in values):
        return None
    return sum(int(value.value.ullVal) for value in values) * _KIB


def _nvlink_lanes(handle: Any) -> int | None:
    """NVLink lanes that are up; 0 for a card without NVLink."""

    def is_up(link: int) -> bool | None:
        return ask(lambda: bool(pynvml.nvmlDeviceGetNvLinkState(handle, link)))

    # A card returns an error for a link that it does not have.
    states = [is_up(link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)]
    return sum(state for state in states if state)


def _numa_node(handle: Any) -> int | None:
    """The host's NUMA node of the card's slot. NVML's NUMA id is for cards that are nodes
    themselves. The kernel has -1 where the host has a single node.
    """
    slot = ask(lambda: pynvml.nvmlDeviceGetPciInfo(handle))
    if slot is None:
        return None
    address = f"{slot.domain:04x}:{slot.bus:02x}:{slot.device:02x}.0"
    try:
        node = int((PCI_DEVICES / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _peer_access(device: torch.device) -> bool | None:
    others = [other for other in range(torch.cuda.device_count()) if other != device.index]
    if not others:
        return None
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)
