"""Versions that do not fit together, as a package folder on the path says them."""

import platform
import sys
from pathlib import Path

import pytest

from fttrain.doctor import versions
from fttrain.doctor.finding import FAILURE, OK, WARNING


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts the metadata of a package of this name where Python looks for it first."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def write(name: str, version: str, *more: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *more]
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    return write


def test_what_is_installed_here_fits() -> None:
    for check in (versions.python, versions.libraries):
        assert check().verdict == OK, check()


def test_a_library_out_of_bounds_is_named_with_what_mends_it(install) -> None:
    """The real bounds, and a torch that is too old for them."""
    install("torch", "2.9.1")
    found = versions.libraries()
    assert found.verdict == FAILURE
    assert found.figure == "torch 2.9.1, <2.14,>=2.11 is wanted"
    assert found.remedy == "pip install 'torch<2.14,>=2.11'"


def test_a_library_that_is_missing_and_one_of_an_extra(install) -> None:
    install("house", "1", "Requires-Dist: torch>=2", "Requires-Dist: nobody-has-this>=3")
    found = versions.libraries("house")
    assert (found.verdict, found.figure) == (FAILURE, "nobody-has-this is missing")
    install("extra", "1", 'Requires-Dist: nobody-has-this>=3; extra == "dev"')
    assert versions.libraries("extra").verdict == OK
    install("extended", "1", 'Requires-Dist: torch>=99; extra == "dev"')
    assert versions.libraries("extended").verdict == WARNING


def test_a_python_that_is_too_old(install) -> None:
    install("house", "1", "Requires-Python: >=4")
    found = versions.python("house")
    assert found.verdict == FAILURE
    assert found.figure == f"{platform.python_version()}, >=4 is wanted"
    assert versions.python("never-installed").verdict == FAILURE


@pytest.mark.parametrize(
    ("built_for", "driver", "usable", "wanted", "verdict", "text"),
    [
        (None, None, False, False, OK, "compute on the CPU"),
        (None, None, False, True, FAILURE, "rig.device=cuda"),
        (None, "570.86.10", False, False, FAILURE, "built without CUDA"),
        ("12.8", None, False, False, WARNING, "no NVIDIA driver"),
        ("12.8", None, False, True, FAILURE, "no NVIDIA driver"),
        ("12.8", "525.60.11", True, False, FAILURE, "too old for CUDA 12.8: 525.60.13"),
        ("12.8", "525.60.13", True, False, OK, "driver 525.60.13"),
        ("13.0", "570.86.10", True, False, FAILURE, "580 or newer"),
        ("13.0", "580.65.06", False, False, FAILURE, "torch finds no card"),
        ("13.0", "580.65.06", True, True, OK, "CUDA 13.0"),
    ],
)
def test_cuda_and_the_driver(
    built_for: str | None, driver: str | None, usable: bool, wanted: bool, verdict: str, text: str
) -> None:
    found = versions.cuda(built_for, driver, usable, wanted)
    assert found.verdict == verdict
    assert text in found.figure
    assert bool(found.remedy) == (verdict != OK)


@pytest.mark.parametrize(("driver", "index"), [("570.86.10", "/cu126"), ("580.65.06", None)])
def test_a_torch_is_named_that_the_driver_runs(driver: str, index: str | None) -> None:
    """CUDA 12.8 has had no builds since torch 2.12."""
    remedy = versions.cuda(None, driver, False).remedy
    assert "'torch>=2.11,<2.14'" in remedy
    assert index in remedy if index else "--index-url" not in remedy
