"""Checks of versions: Python, the libraries, CUDA and the driver."""

import importlib
import importlib.metadata
import platform
from collections.abc import Sequence

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fttrain.doctor.finding import Finding, failure, ok, warning
from fttrain.util.errors import first_line

PROJECT = "fttrain"
# Built against torch or against each other: versions may fit and the import still fail.
COMPANIONS = (
    "bitsandbytes",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "gguf",
    "datasets",
)
# CUDA's major version -> the oldest Linux driver that runs it (NVIDIA, "CUDA Compatibility",
# minor version compatibility).
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580"}
NOT_INSTALLED = failure(
    f"{PROJECT} is not installed, so its requirements are unknown",
    "make setup, or pip install -e .",
)


def python(project: str = PROJECT) -> Finding:
    """Python against the project's bounds."""
    version = platform.python_version()
    try:
        bounds = importlib.metadata.metadata(project)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
    if Version(version) in SpecifierSet(bounds):
        return ok(f"{version} ({bounds} is wanted)")
    return failure(f"{version}, {bounds} is wanted", "make clean setup PYTHON=python3.12")


def libraries(project: str = PROJECT) -> Finding:
    """Every library against the project's bounds; those of an extra only where installed."""
    try:
        texts = importlib.metadata.requires(project) or []
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
    requirements = [Requirement(text) for text in texts]
    misfits = {
        requirement: problem for requirement in requirements if (problem := _misfit(requirement))
    }
    if not misfits:
        return ok(f"torch {torch.__version__}; {len(requirements)} requirements looked at, all fit")
    remedy = "pip install " + " ".join(
        f"'{requirement.name}{requirement.specifier}'" for requirement in misfits
    )
    # A run imports libraries of an extra only where a setting needs them.
    verdict = failure if any(map(_is_needed, misfits)) else warning
    return verdict("; ".join(misfits.values()), remedy)


def imports(names: Sequence[str] = COMPANIONS) -> Finding:
    """Whether each library that runs compute and read with can be imported."""
    problems = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a library built for another machine may raise anything
            problems[name] = f"{name} cannot be imported: {first_line(error)}"
    if not problems:
        return ok(", ".join(names))
    # --no-deps: pip would install another torch.
    return failure(
        "; ".join(problems.values()),
        f"pip install --force-reinstall --no-deps {' '.join(problems)}",
    )


def _is_needed(requirement: Requirement) -> bool:
    """Whether every run needs it, not only an extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _misfit(requirement: Requirement) -> str:
    """The misfit in words; "" where it fits, or where a library of an extra is missing."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing" if _is_needed(requirement) else ""
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version}, {requirement.specifier} is wanted"


def cuda(built_for: str | None, driver: str | None, usable: bool, wanted: bool = False) -> Finding:
    """torch's CUDA against the driver.

    ``built_for``: the CUDA version that torch was built with, None: without; ``driver``: its
    version, None: there is none; ``usable``: whether torch finds a card; ``wanted``:
    rig.device=cuda.
    """
    if built_for is None:
        if driver is None:
            return _on_cpu(
                "torch without CUDA and no NVIDIA driver: runs compute on the CPU", wanted
            )
        return failure(
            f"driver {driver}, but torch {torch.__version__} is built without CUDA",
            _with_cuda(driver),
        )
    if driver is None:
        figure = f"torch is built for CUDA {built_for}, but no NVIDIA driver answers"
        if wanted:
            return failure(figure, "install the driver (sudo ubuntu-drivers install), then reboot")
        return warning(figure, "install the driver, or rig.device=cpu if there is no card")
    oldest = OLDEST_DRIVER.get(Version(built_for).major)
    if oldest is not None and Version(driver) < Version(oldest):
        return failure(
            f"driver {driver} is too old for CUDA {built_for}: {oldest} or newer is needed",
            "sudo ubuntu-drivers install, then reboot; or a torch built for an older CUDA",
        )
    if not usable:
        return failure(
            f"driver {driver} and CUDA {built_for}, but torch finds no card",
            "nvidia-smi: does the driver see one? look at CUDA_VISIBLE_DEVICES, then reboot",
        )
    return ok(f"CUDA {built_for}, driver {driver}")


def _with_cuda(driver: str) -> str:
    """The command that installs a torch for a CUDA of this driver: PyPI has CUDA 13, torch's own
    index CUDA 12 (pytorch/pytorch, issues 178665 and 190355).
    """
    wanted = "pip install --force-reinstall 'torch>=2.11,<2.14'"
    if Version(driver) >= Version(OLDEST_DRIVER[13]):
        return wanted
    return f"{wanted} --index-url https://download.pytorch.org/whl/cu126, or a newer driver"


def _on_cpu(figure: str, wanted: bool) -> Finding:
    if wanted:
        return failure(f"rig.device=cuda: {figure}", "rig.device=cpu, or install driver and torch")
    return ok(figure)
