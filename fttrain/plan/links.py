"""Seconds of a step over each measured link, by the plan's own model of time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fttrain.model.decoder import Architecture
from fttrain.plan import memory
from fttrain.plan.choose import room_bytes
from fttrain.plan.memory import ReservedRank
from fttrain.plan.time import step_time
from fttrain.rig.measure_report import ReportTable
from fttrain.rig.profile import LinkProfile, RigProfile
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import SCHEDULES, StrategyConfig
from fttrain.strategy.spec import StrategySpec
from fttrain.util.errors import UserError

COMPARED = ("replicate", "shard", "pipeline")  # besides the configured one


@dataclass(frozen=True)
class StrategySteps:
    """A strategy's step over each of some links."""

    strategy: str
    seconds: tuple[float | None, ...]  # None: the link lacks a collective of the strategy
    fits: bool  # by its reservations


def steps(
    spec: StrategySpec, architecture: Architecture, rig: RigProfile, links: Sequence[LinkProfile]
) -> list[StrategySteps]:
    """Steps of the configured strategy first, then of others; those that do not go with the
    settings are left out.
    """
    compared = []
    for variant in _variants(spec):
        rooms = [room_bytes(card) for card in rig.cards]
        try:
            reserved = memory.reserve_ranks(variant, architecture, rig.cards[0].kind, rooms)
        except UserError:
            continue
        needed = (memory.reserved_memory(rank).reserved_device_bytes for rank in reserved)
        fits = all(size <= room for size, room in zip(needed, rooms, strict=True))
        link_rigs = (replace(rig, links=(link,)) for link in links)
        seconds = tuple(_seconds(reserved, link_rig) for link_rig in link_rigs)
        compared.append(StrategySteps(variant.strategy.name, seconds, fits))
    return compared


def step_table(
    spec: StrategySpec, architecture: Architecture, rig: RigProfile
) -> ReportTable | None:
    """The table of ``steps``; None where no link was measured, or none covers a strategy."""
    links = [link for link in rig.links if not link.wrong]
    compared = steps(spec, architecture, rig, links) if links else []
    rows = [
        [
            f"strategy={strategy_steps.strategy}"
            + ("" if strategy_steps.fits else " (does not fit)"),
            *("-" if second is None else f"{second:.3f}" for second in strategy_steps.seconds),
        ]
        for strategy_steps in compared
        if any(strategy_steps.seconds)
    ]
    if not rows:
        return None
    size = spec.size
    below = (
        f"As `fttrain plan` computes: {size.gradient_accumulation_steps} micro-batches of "
        f"{size.micro_batch_size} rows of {size.seq_len:,} tokens a rank, the other settings as "
        "configured. What compute hides takes no time."
    )
    return ReportTable(
        "A step over each link",
        ["seconds a step", *(link.transport for link in links)],
        rows,
        "\n".join([below, *_savings(compared, links)]),
    )


def _variants(spec: StrategySpec) -> Iterator[StrategySpec]:
    if spec.strategy.name in SCHEDULES:
        yield spec
    for name in COMPARED:
        kind = SCHEDULES[name]
        if name == spec.strategy.name or (name == "pipeline" and spec.optim.shard):
            continue
        group = spec.schedule.micro_batch_group if kind == spec.schedule.kind else "all"
        yield replace(spec, strategy=StrategyConfig(name), schedule=ScheduleConfig(group, kind))


def _seconds(reserved: Sequence[ReservedRank], rig: RigProfile) -> float | None:
    try:
        return step_time(reserved, rig).seconds
    except UserError:
        return None


def _savings(compared: Sequence[StrategySteps], links: Sequence[LinkProfile]) -> list[str]:
    """A line for each link that is slower than the default: the part of a step that the default
    saves.
    """
    default, *others = links
    lines = []
    for strategy_steps in (strategy_steps for strategy_steps in compared if strategy_steps.fits):
        first_s, *others_s = strategy_steps.seconds
        for other, second in zip(others, others_s, strict=True):
            if first_s is not None and second is not None and second > first_s:
                saved = (second - first_s) / second
                lines.append(
                    f"{default.transport} ({default.seen}) saves {saved:.1%} of a step of "
                    f"strategy={strategy_steps.strategy} beside {other.transport} ({other.seen})."
                )
    return lines
