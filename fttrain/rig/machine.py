"""The identity of this machine, and the versions of its software."""

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

# Containers often lack the first two, and their host name changes; their root may read the third,
# of the mainboard.
_IDENTITIES = ("/etc/machine-id", "/var/lib/dbus/machine-id", "/sys/class/dmi/id/product_uuid")
_LIBRARIES = ("torch", "bitsandbytes", "transformers", "fttrain")


def identity() -> str:
    """Sixteen hex digits that stay the same over reboots; a hash, as machine-id(5) demands."""
    for file in _IDENTITIES:
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        if text:
            break
    else:
        text = platform.node()
    return hashlib.sha256(f"fttrain {text}".encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the libraries and drivers that rates depend on; absent ones are left out."""
    known = {name: importlib.metadata.version(name) for name in _LIBRARIES if _installed(name)}
    if torch.version.cuda:
        known["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        known["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = driver_version()
    return known | ({"driver": driver} if driver else {}) | {"kernel": platform.release()}


def host() -> HostProfile:
    """The host without its rates, which are measured later."""
    return HostProfile(cpu_name(), _cores(), psutil.virtual_memory().total)


def cpu_name() -> str:
    """The name of the processor."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
