"""Host memory: of this process, and free within its control groups and the machine."""

import re
import resource
import sys
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def peak_host_bytes() -> int:
    """Peak resident bytes of this process.

    Linux's getrusage keeps the maximum over execve (getrusage(2)) and so counts the parent's
    memory. VmHWM of /proc/self/status counts this program alone and is read where it exists.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if marked := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
        return int(marked[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def available_host_bytes() -> int:
    """Bytes that programs can still allocate without swapping: the machine's, or the rest of the
    limit of a control group (a container, a batch system).
    """
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def cgroup_limit_bytes(root: Path = CGROUPS) -> int | None:
    """The smallest memory limit of this process's control groups (version 2); None: no limit."""
    limits = [_limit_bytes(level) for level in _cgroup_levels(root)]
    return min((limit for limit in limits if limit is not None), default=None)


def _cgroup_rooms() -> list[int]:
    """Limit minus use of each control group of this process; droppable page cache does not count as
    used.
    """
    rooms = []
    for level in _cgroup_levels(CGROUPS):
        try:
            limit = _limit_bytes(level)
            used = int((level / "memory.current").read_text())
            stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # the root group and version 1 have no such files
        if limit is not None:
            rooms.append(limit - used + int(stat.get("inactive_file", 0)))
    return rooms


def _cgroup_levels(root: Path) -> list[Path]:
    """The folders of the control groups (version 2) that this process is in, innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    path = next((line.split("::", 1)[1] for line in lines if line.startswith("0::")), "/")
    folder = root / path.lstrip("/")
    return [level for level in (folder, *folder.parents) if level.is_relative_to(root)]


def _limit_bytes(level: Path) -> int | None:
    """The memory limit of one control group; None: no limit."""
    try:
        return int((level / "memory.max").read_text())
    except (OSError, ValueError):
        return None  # "max"; the root group and version 1 have no such file
