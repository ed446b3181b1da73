"""What a link means: seconds of a step over each one that was measured, by the plan's own model of
time.
"""

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

COMPARED = ("replicate", "shard", "pipeline")  # beside the configured one


@dataclass(frozen=True)
class StrategySteps:
    """A strategy's step over each of some links."""

    strategy: str
    seconds: tuple[float | None, ...]  # None: a link that lacks what the strategy does
    fits: bool  # as far as its books go


def steps(
    spec: StrategySpec, architecture: Architecture, rig: RigProfile, links: Sequence[LinkProfile]
) -> list[StrategySteps]:
    """The configured strategy first; those that cannot be reserved for ``rig`` are left out."""
    found = []
    for own in _recipes(spec):
        rooms = [room_bytes(card) for card in rig.cards]
        try:
            booked = memory.reserve_ranks(own, architecture, rig.cards[0].kind, rooms)
        except UserError:
            continue
        taken = (memory.reserved_memory(one).booked_bytes for one in booked)
        fits = all(size <= room for size, room in zip(taken, rooms, strict=True))
        alone = (replace(rig, links=(link,)) for link in links)
        seconds = tuple(_seconds(booked, over) for over in alone)
        found.append(StrategySteps(own.strategy.name, seconds, fits))
    return found


def step_table(
    spec: StrategySpec, architecture: Architecture, rig: RigProfile
) -> ReportTable | None:
    """For people; None where no link was measured, or nothing can be said of any."""
    links = [link for link in rig.links if not link.wrong]
    found = steps(spec, architecture, rig, links) if links else []
    rows = [
        [
            f"strategy={one.strategy}" + ("" if one.fits else " (does not fit)"),
            *("-" if second is None else f"{second:.3f}" for second in one.seconds),
        ]
        for one in found
        if any(one.seconds)
    ]
    if not rows:
        return None
    size = spec.size
    below = (
        f"As `fttrain plan` reckons: {size.gradient_accumulation_steps} micro-batches of "
        f"{size.micro_batch_size} rows of {size.seq_len:,} tokens a rank, the other settings as "
        "configured. What compute hides takes no time."
    )
    return ReportTable(
        "A step over each link",
        ["seconds a step", *(link.transport for link in links)],
        rows,
        "\n".join([below, *_savings(found, links)]),
    )


def _recipes(spec: StrategySpec) -> Iterator[StrategySpec]:
    if spec.strategy.name in SCHEDULES:
        yield spec
    for name in COMPARED:
        kind = SCHEDULES[name]
        if name == spec.strategy.name or (name == "pipeline" and spec.optim.shard):
            continue
        group = spec.schedule.micro_batch_group if kind == spec.schedule.kind else "all"
        yield replace(spec, strategy=StrategyConfig(name), schedule=ScheduleConfig(group, kind))


def _seconds(booked: Sequence[ReservedRank], rig: RigProfile) -> float | None:
    try:
        return step_time(booked, rig).seconds
    except UserError:
        return None


def _savings(found: Sequence[StrategySteps], links: Sequence[LinkProfile]) -> list[str]:
    """What the link as it comes saves beside each slower one."""
    usual, *others = links
    lines = []
    for one in (one for one in found if one.fits):
        first_s, *others_s = one.seconds
        for other, second in zip(others, others_s, strict=True):
            if first_s is not None and second is not None and second > first_s:
                saved = (second - first_s) / second
                lines.append(
                    f"{usual.transport} ({usual.seen}) saves {saved:.1%} of a step of "
                    f"strategy={one.strategy} beside {other.transport} ({other.seen})."
                )
    return lines
