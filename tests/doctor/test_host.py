"""Limits of the machine: real ones where a process may set them, folders like the kernel's else."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fttrain.doctor import host
from fttrain.doctor.finding import OK, WARNING
from fttrain.util.units import MIB


@pytest.fixture
def limits() -> Iterator[None]:
    """What a test lowers is put back."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_of_open_files(limits: None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1023, hard))
    assert host.open_files().verdict == WARNING
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    assert host.open_files().verdict == OK


def test_a_small_shared_memory(tmp_path: Path) -> None:
    """On a real tmpfs of 64 MiB, Docker's default, in a mount namespace of its own."""
    script = (
        "import sys; from pathlib import Path; from fttrain.doctor import host;"
        "found = host.shared_memory(Path(sys.argv[1])); print(found.verdict, found.figure)"
    )
    command = f"mount -t tmpfs -o size=64m none {tmp_path} || exit 77; exec {sys.executable} -c"
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", f"{command} '{script}' {tmp_path}"],
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    assert done.stdout.startswith("warning 64 MiB free"), done


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    assert host.shared_memory(tmp_path / "none").figure == "not available"


@pytest.mark.parametrize(
    ("text", "verdict"), [("max", OK), (f"{100 * MIB}", WARNING), (f"{1 << 60}", OK)]
)
def test_a_control_group(text: str, verdict: str, tmp_path: Path) -> None:
    """The process's own group has no limit; the one around all of them says ``text``."""
    (tmp_path / "memory.max").write_text(text + "\n")
    found = host.control_group(tmp_path)
    assert found.verdict == verdict
    assert ("0.10 GiB" in found.figure) == (verdict == WARNING)


def test_swapped_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for used_gib, verdict in ((0, OK), (3, WARNING)):
        figures = psutil.swap_memory()._replace(total=8 << 30, used=used_gib << 30)
        monkeypatch.setattr(psutil, "swap_memory", lambda figures=figures: figures)
        assert host.swap().verdict == verdict


@pytest.mark.parametrize(
    ("name", "driver", "verdict"),
    [
        ("performance", "acpi-cpufreq", OK),
        ("powersave", "acpi-cpufreq", WARNING),
        ("powersave", "intel_pstate", OK),
    ],
)
def test_the_governor(name: str, driver: str, verdict: str, tmp_path: Path) -> None:
    for core in range(2):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text("performance\n" if core else f"{name}\n")
        (folder / "scaling_driver").write_text(f"{driver}\n")
    assert host.governor(tmp_path).verdict == verdict
    assert host.governor(tmp_path / "none").figure == "not available"


def test_wsl() -> None:
    assert host.wsl("5.15.167.4-microsoft-standard-WSL2").verdict == WARNING
    assert host.wsl("6.8.0-48-generic").verdict == OK


@pytest.mark.parametrize(
    ("groups", "options", "cards", "verdict"),
    [
        (0, "quiet", 2, OK),
        (3, "quiet intel_iommu=on", 2, WARNING),
        (3, "quiet intel_iommu=on", 1, OK),
        (3, "intel_iommu=on iommu=pt", 2, OK),
    ],
)
def test_an_iommu_that_translates(
    groups: int, options: str, cards: int, verdict: str, tmp_path: Path
) -> None:
    for group in range(groups):
        (tmp_path / "groups" / str(group)).mkdir(parents=True)
    (tmp_path / "cmdline").write_text(options + "\n")
    found = host.iommu(cards, tmp_path / "groups", tmp_path / "cmdline")
    assert found.verdict == verdict
    assert (f"{groups} IOMMU groups" in found.figure) == bool(groups)
