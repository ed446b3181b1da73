"""Which strategy, with which knobs: each candidate's memory and time, the fastest that fits first.

What a candidate changes: strategy, resident layers, G, activations, micro-batch (rows of a step
stay as they are). Everything else is as the configuration says.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fttrain.memory.ledger import Reservation, largest_parts
from fttrain.model.decoder import Architecture
from fttrain.plan import memory
from fttrain.plan.confirm import confirmed
from fttrain.plan.memory import RankMemory
from fttrain.plan.time import StepTime, step_time
from fttrain.rig.profile import CardProfile, RigProfile
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import POLICIES, SCHEDULES, Placement, StrategyConfig
from fttrain.strategy.spec import StrategySpec
from fttrain.util.errors import UserError
from fttrain.util.units import gib

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Candidate:
    """What became of a candidate."""

    spec: StrategySpec
    settings: str  # as they are typed
    memory: tuple[RankMemory, ...] = ()  # empty: the ledger could not even be made
    host_bytes: int = 0
    time: StepTime | None = None
    reason: str = ""  # why it does not fit; empty: it does
    missing_bytes: int = 0  # of the fullest card or of the host
    confirmed: bool = False  # whether its memory is that of a full run

    @property
    def tokens_per_s(self) -> float:
        return self.time.tokens_per_s if self.time else 0.0

    @property
    def fits(self) -> bool:
        return not self.reason


def room_bytes(card: CardProfile) -> int:
    """What a card has for tensors."""
    return card.memory_bytes - card.beside_bytes


def choose(
    wanted: Sequence[StrategySpec],
    architecture: Architecture,
    rig: RigProfile,
    progress: Progress,
    more_resident: bool = True,
) -> list[Candidate]:
    """The fastest that fits first; then those that do not fit, by what they lack.

    wanted: such as ``candidates``
    more_resident: whether a stream without resident layers may have as many as there is room for

    Raises UserError for a rate that ``rig`` lacks.
    """
    total = len(wanted) + 1  # the winner is run in full
    found = []
    for done, candidate in enumerate(wanted, start=1):
        verdict = judge(candidate, architecture, rig)
        found.append(verdict)
        own = candidate.strategy
        if more_resident and (own.name, own.resident_layers) == ("stream", 0):
            found += _more_resident(verdict, architecture, rig)
        progress(done, total)
    unique = list({verdict.settings: verdict for verdict in found}.values())
    fitting = [verdict for verdict in unique if verdict.fits]
    others = [verdict for verdict in unique if not verdict.fits]
    fitting.sort(key=lambda verdict: -verdict.tokens_per_s)
    fitting, refused = _first_confirmed(fitting, architecture, rig)
    progress(total, total)
    others = sorted(
        others + refused, key=lambda verdict: (not verdict.memory, verdict.missing_bytes)
    )
    return fitting + others


def _first_confirmed(
    fitting: list[Candidate], architecture: Architecture, rig: RigProfile
) -> tuple[list[Candidate], list[Candidate]]:
    """``fitting``, the first of which a full run has confirmed, and those that one has refused."""
    refused: list[Candidate] = []
    for place, verdict in enumerate(fitting):
        whole = confirm(verdict, architecture, rig)
        if whole.fits:
            return [whole, *fitting[place + 1 :]], refused
        refused.append(whole)
    return [], refused


def candidates(spec: StrategySpec, world_size: int) -> Iterator[StrategySpec]:
    """The configuration's own first, then all others."""
    yield spec
    names = SCHEDULES if world_size > 1 else ("replicate", "stream")
    activations = dict.fromkeys([spec.placement.activations, *POLICIES])
    for name in names:
        if name == "pipeline" and spec.optim.shard:
            continue
        for rows, steps in _splits(spec):
            for kept in activations:
                for group in ("all", 1) if SCHEDULES[name] == "grouped" and steps > 1 else ("all",):
                    yield replace(
                        spec,
                        strategy=StrategyConfig(name),
                        schedule=ScheduleConfig(group, SCHEDULES[name]),
                        size=replace(
                            spec.size, micro_batch_size=rows, gradient_accumulation_steps=steps
                        ),
                        placement=_keeping(spec, kept),
                    )


def _keeping(spec: StrategySpec, kept: str | tuple[str, ...]) -> Placement:
    if kept == spec.placement.activations:
        return spec.placement
    layer_inputs = spec.placement.layer_inputs if kept == "recompute" else "device"
    return replace(spec.placement, activations=kept, layer_inputs=layer_inputs)


def _splits(spec: StrategySpec) -> list[tuple[int, int]]:
    """(rows of a micro-batch, micro-batches): as it is, halved and doubled."""
    rows, steps = spec.size.micro_batch_size, spec.size.gradient_accumulation_steps
    found = [(rows, steps)]
    if rows % 2 == 0:
        found.append((rows // 2, steps * 2))
    if steps % 2 == 0:
        found.append((rows * 2, steps // 2))
    return found


def judge(spec: StrategySpec, architecture: Architecture, rig: RigProfile) -> Candidate:
    """``spec`` on ``rig``: what it takes, whether that is there, how long a step lasts."""
    settings, kind = written(spec), rig.cards[0].kind
    rooms = [room_bytes(card) for card in rig.cards]
    try:
        booked = memory.reserve_ranks(spec, architecture, kind, rooms)
    except UserError as error:
        return Candidate(spec, settings, reason=str(error))
    taken = [memory.reserved_memory(own) for own in booked]
    if not _lacking(taken, rig)[0]:  # else the ledger alone are too much
        taken = memory.with_workspace(taken, spec, architecture, kind)
    reason, missing_bytes = _lacking(taken, rig)
    return Candidate(
        spec,
        settings,
        tuple(taken),
        memory.host_bytes(taken, kind),
        step_time(booked, rig),
        reason,
        missing_bytes,
    )


def reckoned(spec: StrategySpec, architecture: Architecture, rig: RigProfile) -> StepTime:
    """How long a step of ``spec`` lasts, whether or not it fits. Raises UserError as
    ``memory.book``, and for a rate that ``rig`` lacks.
    """
    rooms = [room_bytes(card) for card in rig.cards]
    return step_time(memory.reserve_ranks(spec, architecture, rig.cards[0].kind, rooms), rig)


def confirm(verdict: Candidate, architecture: Architecture, rig: RigProfile) -> Candidate:
    """``verdict`` by the memory of one full run."""
    kind, rooms = rig.cards[0].kind, [room_bytes(card) for card in rig.cards]
    taken = confirmed(verdict.memory, verdict.spec, architecture, kind, rooms)
    reason, missing_bytes = _lacking(taken, rig)
    return replace(
        verdict,
        memory=tuple(taken),
        host_bytes=memory.host_bytes(taken, kind),
        reason=reason,
        missing_bytes=missing_bytes,
        confirmed=True,
    )


def _lacking(taken: Sequence[RankMemory], rig: RigProfile) -> tuple[str, int]:
    """Why it does not fit, and what is missing; "" and 0 where it fits."""
    on_cpu = rig.cards[0].kind == "cpu"  # its ranks have the host's memory, all of them together
    for own, card in () if on_cpu else zip(taken, rig.cards, strict=True):
        missing = own.needed_bytes - room_bytes(card)
        if missing > 0:
            parts = [Reservation(*item) for item in own.device.items()]
            return (
                f"card {own.rank}: {gib(own.needed_bytes)} of {gib(room_bytes(card))}: "
                f"{largest_parts(parts)}",
                missing,
            )
    needed = memory.host_bytes(taken, rig.cards[0].kind)
    there = rig.host.memory_bytes - sum(card.beside_bytes for card in rig.cards if on_cpu)
    if needed > there:
        own_parts = Counter(taken[0].shared)
        for own in taken:
            own_parts.update({**own.host, **(own.device if on_cpu else {})})
        parts = [Reservation(*item) for item in own_parts.items()]
        return f"host: {gib(needed)} of {gib(there)}: {largest_parts(parts)}", needed - there
    return "", 0


def _more_resident(
    verdict: Candidate, architecture: Architecture, rig: RigProfile
) -> list[Candidate]:
    """A stream with as many resident layers as the cards have room for, if that is more."""
    if not verdict.fits:
        return []
    layer_bytes = memory.layer_bytes(verdict.spec, architecture)
    rooms = [
        (room_bytes(card) - own.needed_bytes) // layer_bytes
        for own, card in zip(verdict.memory, rig.cards, strict=True)
    ]
    fitting = tuple(min(room, architecture.layers) for room in rooms)
    if not any(fitting):
        return []
    kept = fitting[0] if len(set(fitting)) == 1 else fitting
    strategy = replace(verdict.spec.strategy, resident_layers=kept)
    return [judge(replace(verdict.spec, strategy=strategy), architecture, rig)]


def written(spec: StrategySpec) -> str:
    """What makes a configuration this candidate, as it is typed."""
    strategy, size, kept = spec.strategy, spec.size, spec.placement.activations
    said = [f"strategy={strategy.name}"]
    if strategy.resident_layers:
        resident = strategy.resident_layers
        shown = list(resident) if isinstance(resident, tuple) else resident
        said.append(f"strategy.resident_layers={str(shown).replace(' ', '')}")
    if spec.schedule.kind == "grouped":
        said.append(f"schedule.micro_batch_group={spec.schedule.micro_batch_group}")
    said.append(f"activations={kept if isinstance(kept, str) else '[' + ','.join(kept) + ']'}")
    if spec.placement.layer_inputs != "device":
        said.append(f"layer_inputs={spec.placement.layer_inputs}")
    said.append(f"loop.micro_batch_size={size.micro_batch_size}")
    said.append(f"loop.gradient_accumulation_steps={size.gradient_accumulation_steps}")
    return " ".join(said)
