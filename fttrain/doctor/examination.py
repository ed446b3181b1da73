"""The list of all checks, and the course of an examination."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch

from fttrain.checkpoint.config import ModelConfig
from fttrain.checkpoint.source import resolve
from fttrain.doctor import cards, disk, host, kernels, links, versions
from fttrain.doctor.finding import FAILURE, OK, WARNING, Finding, failure, warning
from fttrain.errors import UserError, first_line
from fttrain.model.config import LoraConfig
from fttrain.quant.config import QuantConfig
from fttrain.rig.config import RigConfig
from fttrain.rig.nvml import driver_version
from fttrain.secrets import redact
from fttrain.strategy.build import frozen_base

Check = Callable[[], Finding]
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
    there = _cards() if usable else []
    memory_bytes = psutil.virtual_memory().total
    driver, built_for = driver_version(), torch.version.cuda
    return [
        ("python", versions.python),
        ("libraries", versions.libraries),
        ("cuda", lambda: versions.cuda(built_for, driver, usable, rig.device == "cuda")),
        ("cards", lambda: cards.present(cards.found_cards() if usable else [])),
        ("wsl", host.wsl),
        ("pcie link", lambda: cards.pcie(there)),
        ("power limit", lambda: cards.power(there)),
        ("ecc", lambda: cards.ecc(there)),
        ("iommu", lambda: host.iommu(len(there))),
        ("accelerate and P2P", lambda: cards.accelerate_habit(there, accelerate_is_content())),
        ("host memory", lambda: cards.host_memory(there, memory_bytes)),
        ("control group", host.control_group),
        ("locked memory", lambda: host.locked_memory(torch.device("cuda" if on_card else "cpu"))),
        ("shared memory", host.shared_memory),
        ("swap", host.swap),
        ("open files", host.open_files),
        ("cpu governor", host.governor),
        ("disk, cache", lambda: _of_model(wanted, _cache)),
        ("disk, checkpoints", lambda: _of_model(wanted, _checkpoints)),
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
    checks = [("quantiser", kernels.quantiser), ("attention", kernels.attention)]
    if count:
        checks.append(("norm, rotary, SwiGLU", kernels.norm_rotary_swiglu))
    return [
        (f"{name}{where}", partial(check, device))
        for name, check in checks
        for where, device in cards_named or [("", torch.device("cpu"))]
    ]


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


def accelerate_is_content() -> bool:
    """Whether accelerate would leave P2P on for the cards and the driver that it finds."""
    from accelerate.utils import check_cuda_p2p_ib_support  # heavy

    return bool(check_cuda_p2p_ib_support())


def _of_model(wanted: Wanted, check: Callable[[Wanted], Finding]) -> Finding:
    try:
        return check(wanted)
    except UserError as error:
        return warning(f"nobody knows what the model needs: {error}", "another model.path=")


def _cache(wanted: Wanted) -> Finding:
    base = frozen_base(resolve(wanted.model), wanted.quant, wanted.model.dtype)
    return disk.cache(base, wanted.cache_dir)


def _checkpoints(wanted: Wanted) -> Finding:
    base = frozen_base(resolve(wanted.model), wanted.quant, wanted.model.dtype)
    return disk.checkpoints(base, wanted.lora, wanted.keep_last, wanted.output)
