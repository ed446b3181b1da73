"""The list of all checks, and the course of an examination."""

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
IMPORTS = "imports"  # the check that says which library is broken
# They load what a run loads.
DISK, KERNELS, LOCKED = (f"fttrain.doctor.{name}" for name in ("disk", "kernels", "locked"))
Progress = Callable[[str, int, int], None]  # name of the check that begins, its place, how many


@dataclass(frozen=True)
class Wanted:
    """What the run would have: its model, where it writes, what it saves."""

    model: ModelConfig
    quant: QuantConfig
    lora: LoraConfig
    cache_dir: str | None
    output: Path
    keep_last: int


def all_checks(rig: RigConfig, wanted: Wanted) -> list[tuple[str, Check]]:
    """Every check with its name, the quick ones first."""
    usable = torch.cuda.is_available()
    on_card = usable and rig.device != "cpu"
    device = torch.device("cuda" if on_card else "cpu")
    there = _cards() if usable else []
    memory_bytes = psutil.virtual_memory().total
    driver, built_for = driver_version(), torch.version.cuda
    return [
        ("python", versions.python),
        ("libraries", versions.libraries),
        (IMPORTS, versions.imports),
        ("cuda", lambda: versions.cuda(built_for, driver, usable, rig.device == "cuda")),
        ("cards", lambda: cards.present(cards.found_cards() if usable else [])),
        ("wsl", host.wsl),
        ("pcie link", lambda: cards.pcie(there)),
        ("power limit", lambda: cards.power(there)),
        ("ecc", lambda: cards.ecc(there)),
        ("iommu", lambda: host.iommu(len(there))),
        ("accelerate and P2P", _late("accelerate.utils", partial(_accelerate_habit, there))),
        ("host memory", lambda: cards.host_memory(there, memory_bytes)),
        ("control group", host.control_group),
        ("locked memory", _late(LOCKED, partial(_on_device, "locked_memory", device))),
        ("shared memory", host.shared_memory),
        ("swap", host.swap),
        ("open files", host.open_files),
        ("cpu governor", host.governor),
        ("disk, cache", _late(DISK, partial(_cache, wanted))),
        ("disk, checkpoints", _late(DISK, partial(_checkpoints, wanted))),
        *_of_kernels(len(there) if on_card else 0),
        ("gloo", lambda: links.all_reduce("gloo", "cpu")),
        ("nccl", lambda: links.all_reduce("nccl", "cuda")),
        ("copies between cards", lambda: links.peer_copy(len(there))),
    ]


def _cards() -> list[cards.Card]:
    """None where CUDA does not even start: the check of that name then says why."""
    try:
        return cards.found_cards()
    except RuntimeError:
        return []


def _of_kernels(count: int) -> list[tuple[str, Check]]:
    """On each of ``count`` cards; without any on the CPU."""
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
    """A check with a module that is loaded only then: a broken library ends no other check."""

    def made() -> Finding:
        try:
            loaded = importlib.import_module(module)
        except Exception as error:  # as in versions.imports, which tells what mends it
            return failure(f"not looked at: {first_line(error)}", f"first what {IMPORTS} names")
        return check(loaded)

    return made


def examine(
    checks: Sequence[tuple[str, Check]], progress: Progress
) -> Iterator[tuple[str, Finding]]:
    """The checks one after the other; one that breaks is a failure, and stops no other."""
    for place, (name, check) in enumerate(checks):
        progress(name, place, len(checks))
        try:
            found = check()
        except Exception as error:  # the machine is what is in doubt here
            found = failure(
                f"the check itself failed: {type(error).__name__}: {first_line(error)}",
                f"please report it with the output of FTTRAIN_DEBUG=1 fttrain doctor ({name})",
            )
        yield name, replace(found, figure=redact(found.figure), remedy=redact(found.remedy))


def summary(findings: Sequence[tuple[str, Finding]]) -> dict[str, object]:
    """All of it as JSON values."""
    verdicts = [found.verdict for _, found in findings]
    return {
        "checks": [{"check": name, **asdict(found)} for name, found in findings],
        **{verdict: verdicts.count(verdict) for verdict in (OK, WARNING, FAILURE)},
    }


def _accelerate_habit(there: Sequence[cards.Card], utils: ModuleType) -> Finding:
    return cards.accelerate_habit(there, bool(utils.check_cuda_p2p_ib_support()))


def _cache(wanted: Wanted, disk: ModuleType) -> Finding:
    found: Finding = disk.of_model(
        wanted.model, wanted.quant, lambda base: disk.cache(base, wanted.cache_dir)
    )
    return found


def _checkpoints(wanted: Wanted, disk: ModuleType) -> Finding:
    found: Finding = disk.of_model(
        wanted.model,
        wanted.quant,
        lambda base: disk.checkpoints(base, wanted.lora, wanted.keep_last, wanted.output),
    )
    return found


def _on_device(check: str, device: torch.device, checks: ModuleType) -> Finding:
    found: Finding = getattr(checks, check)(device)
    return found
