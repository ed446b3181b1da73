"""Which machine this is, and with what it runs."""

import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import psutil
import torch

from fttrain.rig.nvml import driver_version
from fttrain.rig.profile import HostProfile

# Containers often have none of the first two and another host name each time; their root may read
# the third, the mainboard's.
_IDENTITIES = ("/etc/machine-id", "/var/lib/dbus/machine-id", "/sys/class/dmi/id/product_uuid")
_LIBRARIES = ("torch", "bitsandbytes", "transformers", "fttrain")


def identity() -> str:
    """Sixteen hex digits that stay the same over reboots; hashed, as the system asks for its own
    (machine-id(5)).
    """
    for file in _IDENTITIES:
        try:
            found = Path(file).read_text().strip()
        except OSError:
            continue
        if found:
            break
    else:
        found = platform.node()
    return hashlib.sha256(f"fttrain {found}".encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what a rate depends on; what is not there is left out."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES if _installed(name)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = driver_version()
    return found | ({"driver": driver} if driver else {}) | {"kernel": platform.release()}


def host() -> HostProfile:
    """What the machine is; its rates are still to be measured."""
    return HostProfile(cpu_name(), _cores(), psutil.virtual_memory().total)


def cpu_name() -> str:
    """As the processor calls itself."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
