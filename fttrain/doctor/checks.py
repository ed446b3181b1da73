"""The list of all checks, and the loop that runs them."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import psutil
import torch

from fttrain.doctor import cards, host, links, versions
from fttrain.doctor.finding import FAILURE, OK, WARNING, Finding, failure
from fttrain.frozen.config import ModelConfig
from fttrain.model.config import LoraConfig
from fttrain.quant.config import QuantConfig
from fttrain.rig.config import RigConfig
from fttrain.rig.nvml import driver_version
from fttrain.util.errors import first_line
from fttrain.util.redact import redact

Check = Callable[[], Finding]
IMPORTS = "imports"  # the check that names a broken library
# Modules that load libraries of a run.
DISK, KERNELS, LOCKED = (f"fttrain.doctor.{name}" for name in ("disk", "kernels", "locked"))
Progress = Callable[[str, int, int], None]  # (name of the check that begins, its index, count)


@dataclass(frozen=True)
class RunNeeds:
    """The settings of a run that the checks need: its model, its output, its checkpoints."""

    model: ModelConfig
    quant: QuantConfig
    lora: LoraConfig
    cache_dir: str | None
    output: Path
    keep_last: int


def all_checks(rig: RigConfig, needs: RunNeeds) -> list[tuple[str, Check]]:
    """Every check with its name, the quick ones first."""
    usable = torch.cuda.is_available()
    on_card = usable and rig.device != "cpu"
    device = torch.device("cuda" if on_card else "cpu")
    present = _cards() if usable else []
    memory_bytes = psutil.virtual_memory().total
    driver, built_for = driver_version(), torch.version.cuda
    return [
        ("python", versions.python),
        ("libraries", versions.libraries),
        (IMPORTS, versions.imports),
        ("cuda", lambda: versions.cuda(built_for, driver, usable, rig.device == "cuda")),
        ("cards", lambda: cards.listing(cards.list_cards() if usable else [])),
        ("wsl", host.wsl),
        ("pcie link", lambda: cards.pcie(present)),
        ("power limit", lambda: cards.power(present)),
        ("ecc", lambda: cards.ecc(present)),
        ("iommu", lambda: host.iommu(len(present))),
        ("accelerate and P2P", _late("accelerate.utils", partial(_accelerate_habit, present))),
        ("host memory", lambda: cards.host_memory(present, memory_bytes)),
        ("control group", host.control_group),
        ("locked memory", _late(LOCKED, partial(_on_device, "locked_memory", device))),
        ("shared memory", host.shared_memory),
        ("swap", host.swap),
        ("open files", host.open_files),
        ("cpu governor", host.governor),
        ("disk, cache", _late(DISK, partial(_cache, needs))),
        ("disk, checkpoints", _late(DISK, partial(_checkpoints, needs))),
        *_of_kernels(len(present) if on_card else 0),
        ("gloo", lambda: links.all_reduce("gloo", "cpu")),
        ("nccl", lambda: links.all_reduce("nccl", "cuda")),
        ("copies between cards", lambda: links.peer_copy(len(present))),
    ]


def _cards() -> list[cards.Card]:
    """The cards; [] where CUDA does not start, which the check "cuda" explains."""
    try:
        return cards.list_cards()
    except RuntimeError:
        return []


def _of_kernels(count: int) -> list[tuple[str, Check]]:
    """Checks of kernels on each of ``count`` cards; without cards on the CPU."""
    cards_named = [(f", card {i}", torch.device("cuda", i)) for i in range(count)]
    checks = [("quantiser", "quantiser"), ("attention", "attention")]
    if count:
        checks.append(("norm, rotary, SwiGLU", "norm_rotary_swiglu"))
    return [
        (f"{name}{where}", _late(KERNELS, partial(_on_device, check, device)))
        for name, check in checks
        for where, device in cards_named or [("", torch.device("cpu"))]
    ]


def _late(module: str, check: Callable[[ModuleType], Finding]) -> Check:
    """A check that imports ``module`` when it runs: a broken library fails no other check."""

    def run() -> Finding:
        try:
            loaded = importlib.import_module(module)
        except Exception as error:  # as in versions.imports, which names the remedy
            return failure(f"not looked at: {first_line(error)}", f"first what {IMPORTS} names")
        return check(loaded)

    return run


def examine(
    checks: Sequence[tuple[str, Check]], progress: Progress
) -> Iterator[tuple[str, Finding]]:
    """Run the checks one after the other; one that raises counts as a failure."""
    for index, (name, check) in enumerate(checks):
        progress(name, index, len(checks))
        try:
            finding = check()
        except Exception as error:  # a broken machine may raise anything
            finding = failure(
                f"the check itself failed: {type(error).__name__}: {first_line(error)}",
                f"please report it with the output of FTTRAIN_DEBUG=1 fttrain doctor ({name})",
            )
        yield name, replace(finding, figure=redact(finding.figure), remedy=redact(finding.remedy))


def summary(findings: Sequence[tuple[str, Finding]]) -> dict[str, object]:
    """All findings as JSON values."""
    verdicts = [finding.verdict for _, finding in findings]
    return {
        "checks": [{"check": name, **asdict(finding)} for name, finding in findings],
        **{verdict: verdicts.count(verdict) for verdict in (OK, WARNING, FAILURE)},
    }


def _accelerate_habit(present: Sequence[cards.Card], utils: ModuleType) -> Finding:
    return cards.accelerate_habit(present, bool(utils.check_cuda_p2p_ib_support()))


def _cache(needs: RunNeeds, disk: ModuleType) -> Finding:
    finding: Finding = disk.with_frozen_base(
        needs.model, needs.quant, lambda base: disk.cache(base, needs.cache_dir)
    )
    return finding


def _checkpoints(needs: RunNeeds, disk: ModuleType) -> Finding:
    finding: Finding = disk.with_frozen_base(
        needs.model,
        needs.quant,
        lambda base: disk.checkpoints(base, needs.lora, needs.keep_last, needs.output),
    )
    return finding


def _on_device(check: str, device: torch.device, checks: ModuleType) -> Finding:
    finding: Finding = getattr(checks, check)(device)
    return finding
