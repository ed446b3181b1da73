"""Checks of the machine around the cards: limits, memory, swap, kernel."""

import platform
import resource
from pathlib import Path

import psutil

from fttrain.doctor.finding import NOT_AVAILABLE, Finding, ok, warning
from fttrain.memory.host import cgroup_limit_bytes
from fttrain.util.units import GIB, MIB, gib

SHM_BYTES = 1 * GIB  # NCCL's buffers between ranks without peer access; Docker's default is less
OPEN_FILES = 1024  # one for each layer's file, libraries, connections of a few ranks
SWAPPED_BYTES = 1 * GIB
BYPASS = ("iommu=pt", "iommu.passthrough=1", "intel_iommu=off", "amd_iommu=off", "iommu=off")


def open_files() -> Finding:
    """The limit of open files (RLIMIT_NOFILE)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    figure = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} open files"
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return ok(figure)
    more = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, 64 * OPEN_FILES)
    return warning(f"{figure}, {OPEN_FILES:,} are wanted", f"ulimit -n {more}")


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Free bytes of /dev/shm, which NCCL uses between cards without peer access."""
    if not folder.is_dir():
        return ok(NOT_AVAILABLE)
    free_bytes = psutil.disk_usage(str(folder)).free
    figure = f"{free_bytes / MIB:,.0f} MiB free in {folder}"
    if free_bytes >= SHM_BYTES:
        return ok(figure)
    remedy = f"sudo mount -o remount,size=4G {folder} (Docker: --shm-size=4g or --ipc=host)"
    return warning(f"{figure}, {SHM_BYTES / MIB:,.0f} MiB are wanted", remedy)


def swap() -> Finding:
    """Swapped-out bytes: they make a step wait for the disk."""
    memory = psutil.swap_memory()
    if memory.used < SWAPPED_BYTES:
        return ok(f"{gib(memory.used)} of {gib(memory.total)} used")
    remedy = "close other programs; then sudo swapoff -a && sudo swapon -a"
    return warning(f"{gib(memory.used)} of {gib(memory.total)} used", remedy)


def control_group(root: Path = Path("/sys/fs/cgroup")) -> Finding:
    """The memory limit of a container or a batch system."""
    limit_bytes, total_bytes = cgroup_limit_bytes(root), psutil.virtual_memory().total
    if limit_bytes is None or limit_bytes >= total_bytes:
        return ok("no limit for memory")
    figure = f"{gib(limit_bytes)} of the machine's {gib(total_bytes)}"
    if limit_bytes >= total_bytes / 2:
        return ok(figure)
    return warning(figure, "a larger limit (Docker: --memory, Slurm: --mem), or none")


def governor(root: Path = Path("/sys/devices/system/cpu")) -> Finding:
    """The kernel's governor of the cores' clock. powersave follows the load with intel_pstate; with
    other drivers it stays at the lowest clock.
    """
    files = sorted(root.glob("cpu[0-9]*/cpufreq/scaling_governor"))
    governors = {file.read_text().strip() for file in files}
    if not governors:
        return ok(NOT_AVAILABLE)
    drivers = {
        file.with_name("scaling_driver").read_text().strip()
        for file in files
        if file.with_name("scaling_driver").is_file()
    }
    figure = ", ".join(sorted(governors))
    slow = "powersave" in governors and not any(name.startswith("intel_pst") for name in drivers)
    if slow:
        return warning(figure, "sudo cpupower frequency-set -g performance")
    return ok(figure)


def wsl(release: str | None = None) -> Finding:
    """Linux on Windows (WSL2): half of the memory, little of it page-locked, no peer access.

    ``release``: of the kernel; None: the running one.
    """
    name = release or platform.release()
    if "microsoft" not in name.lower():
        return ok(f"kernel {name}")
    return warning(
        f"WSL2 (kernel {name}): little page-locked memory, no peer access between cards",
        "memory= in %USERPROFILE%\\.wslconfig, strategy=shard or pipeline; better: Linux itself",
    )


def iommu(
    cards: int,
    groups: Path = Path("/sys/kernel/iommu_groups"),
    command_line: Path = Path("/proc/cmdline"),
) -> Finding:
    """IOMMU groups: a translating IOMMU, or ACS, sends copies between cards through the root
    complex, where they are slow, and with some boards hang or corrupt.
    """
    options = command_line.read_text().split() if command_line.is_file() else []
    passing = [option for option in options if option in BYPASS]
    count = sum(1 for _ in groups.iterdir()) if groups.is_dir() else 0
    if not count:
        return ok("no IOMMU groups")
    figure = f"{count} IOMMU groups" + (f", {passing[0]}" if passing else "")
    if passing or cards < 2:
        return ok(figure)
    return warning(
        f"{figure}: copies between cards may take the long way, hang or corrupt",
        "iommu=pt on the kernel's command line (GRUB_CMDLINE_LINUX, update-grub), ACS off in the "
        "BIOS; export NCCL_P2P_DISABLE=1 until then",
    )
