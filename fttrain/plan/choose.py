"""The choice of a strategy and its settings: each candidate's memory and time, the fastest that
fits first.

A candidate changes strategy, resident layers, G, activations and the micro-batch (the rows of a
step stay). Everything else is as configured.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fttrain.memory.ledger import Reservation, largest_parts
from fttrain.model.decoder import Architecture
from fttrain.plan import memory, workspace
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
    """A configuration with its memory, its time, and whether it fits a rig."""

    spec: StrategySpec
    settings: str  # as typed on the command line
    memory: tuple[RankMemory, ...] = ()  # (): the settings do not go together
    host_bytes: int = 0
    time: StepTime | None = None
    reason: str = ""  # why it does not fit; "" where it fits
    missing_bytes: int = 0  # of the fullest card or of the host
    confirmed: bool = False  # whether its memory comes from a full run on fake tensors

    @property
    def tokens_per_s(self) -> float:
        return self.time.tokens_per_s if self.time else 0.0

    @property
    def fits(self) -> bool:
        return not self.reason


def room_bytes(card: CardProfile) -> int:
    """Bytes of a card that tensors can have."""
    return card.memory_bytes - card.beside_bytes


def choose(
    specs: Sequence[StrategySpec],
    architecture: Architecture,
    rig: RigProfile,
    progress: Progress,
    more_resident: bool = True,
) -> list[Candidate]:
    """Candidates of ``specs``: the fastest that fits first, then those that do not fit, by missing
    bytes.

    more_resident: whether a stream without resident layers is also tried with as many as fit

    Raises UserError for a rate that ``rig`` lacks.
    """
    total = len(specs) + 1  # the winner runs in full as well
    judged = []
    for done, spec in enumerate(specs, start=1):
        candidate = judge(spec, architecture, rig)
        judged.append(candidate)
        strategy = spec.strategy
        if more_resident and (strategy.name, strategy.resident_layers) == ("stream", 0):
            judged += _more_resident(candidate, architecture, rig)
        progress(done, total)
    unique = list({candidate.settings: candidate for candidate in judged}.values())
    fitting = [candidate for candidate in unique if candidate.fits]
    others = [candidate for candidate in unique if not candidate.fits]
    fitting.sort(key=lambda candidate: -candidate.tokens_per_s)
    fitting, too_large = _first_confirmed(fitting, architecture, rig)
    progress(total, total)
    others = sorted(
        others + too_large, key=lambda candidate: (not candidate.memory, candidate.missing_bytes)
    )
    return fitting + others


def _first_confirmed(
    fitting: list[Candidate], architecture: Architecture, rig: RigProfile
) -> tuple[list[Candidate], list[Candidate]]:
    """``fitting`` from the first that a full run confirms, and those that one shows not to fit."""
    too_large: list[Candidate] = []
    for index, candidate in enumerate(fitting):
        full = confirm(candidate, architecture, rig)
        if full.fits:
            return [full, *fitting[index + 1 :]], too_large
        too_large.append(full)
    return [], too_large


def candidates(spec: StrategySpec, world_size: int) -> Iterator[StrategySpec]:
    """Variants of ``spec``: itself first, then all others."""
    yield spec
    names = SCHEDULES if world_size > 1 else ("replicate", "stream")
    activations = dict.fromkeys([spec.placement.activations, *POLICIES])
    for name in names:
        if name == "pipeline" and spec.optim.shard:
            continue
        for rows, steps in _splits(spec):
            for policy in activations:
                for group in ("all", 1) if SCHEDULES[name] == "grouped" and steps > 1 else ("all",):
                    yield replace(
                        spec,
                        strategy=StrategyConfig(name),
                        schedule=ScheduleConfig(group, SCHEDULES[name]),
                        size=replace(
                            spec.size, micro_batch_size=rows, gradient_accumulation_steps=steps
                        ),
                        placement=_with_policy(spec, policy),
                    )


def _with_policy(spec: StrategySpec, policy: str | tuple[str, ...]) -> Placement:
    if policy == spec.placement.activations:
        return spec.placement
    layer_inputs = spec.placement.layer_inputs if policy == "recompute" else "device"
    return replace(spec.placement, activations=policy, layer_inputs=layer_inputs)


def _splits(spec: StrategySpec) -> list[tuple[int, int]]:
    """(rows of a micro-batch, micro-batches): as configured, halved and doubled."""
    rows, steps = spec.size.micro_batch_size, spec.size.gradient_accumulation_steps
    splits = [(rows, steps)]
    if rows % 2 == 0:
        splits.append((rows // 2, steps * 2))
    if steps % 2 == 0:
        splits.append((rows * 2, steps // 2))
    return splits


def judge(spec: StrategySpec, architecture: Architecture, rig: RigProfile) -> Candidate:
    """``spec`` on ``rig``: its memory, whether that fits, and the time of a step."""
    settings, kind = settings_text(spec), rig.cards[0].kind
    rooms = [room_bytes(card) for card in rig.cards]
    try:
        reserved = memory.reserve_ranks(spec, architecture, kind, rooms)
    except UserError as error:
        return Candidate(spec, settings, reason=str(error))
    ranks = [memory.reserved_memory(rank) for rank in reserved]
    if not _shortage(ranks, rig)[0]:  # else the reserved parts alone are too much
        ranks = workspace.with_workspace(ranks, spec, architecture, kind)
    reason, missing_bytes = _shortage(ranks, rig)
    return Candidate(
        spec,
        settings,
        tuple(ranks),
        memory.host_bytes(ranks, kind),
        step_time(reserved, rig),
        reason,
        missing_bytes,
    )


def estimate_step(spec: StrategySpec, architecture: Architecture, rig: RigProfile) -> StepTime:
    """The time of a step of ``spec``, whether or not it fits. Raises UserError as
    ``memory.reserve_ranks``, and for a rate that ``rig`` lacks.
    """
    rooms = [room_bytes(card) for card in rig.cards]
    return step_time(memory.reserve_ranks(spec, architecture, rig.cards[0].kind, rooms), rig)


def confirm(candidate: Candidate, architecture: Architecture, rig: RigProfile) -> Candidate:
    """``candidate`` with the memory of one full run."""
    kind, rooms = rig.cards[0].kind, [room_bytes(card) for card in rig.cards]
    ranks = confirmed(candidate.memory, candidate.spec, architecture, kind, rooms)
    reason, missing_bytes = _shortage(ranks, rig)
    return replace(
        candidate,
        memory=tuple(ranks),
        host_bytes=memory.host_bytes(ranks, kind),
        reason=reason,
        missing_bytes=missing_bytes,
        confirmed=True,
    )


def _shortage(ranks: Sequence[RankMemory], rig: RigProfile) -> tuple[str, int]:
    """Why ``ranks`` do not fit and how many bytes are missing; "" and 0 where they fit."""
    on_cpu = rig.cards[0].kind == "cpu"  # all ranks together have the host's memory
    for rank, card in () if on_cpu else zip(ranks, rig.cards, strict=True):
        missing = rank.needed_bytes - room_bytes(card)
        if missing > 0:
            parts = [Reservation(*item) for item in rank.device.items()]
            return (
                f"card {rank.rank}: {gib(rank.needed_bytes)} of {gib(room_bytes(card))}: "
                f"{largest_parts(parts)}",
                missing,
            )
    needed = memory.host_bytes(ranks, rig.cards[0].kind)
    available = rig.host.memory_bytes - sum(card.beside_bytes for card in rig.cards if on_cpu)
    if needed > available:
        host_parts = Counter(ranks[0].shared)
        for rank in ranks:
            host_parts.update({**rank.host, **(rank.device if on_cpu else {})})
        parts = [Reservation(*item) for item in host_parts.items()]
        return (
            f"host: {gib(needed)} of {gib(available)}: {largest_parts(parts)}",
            needed - available,
        )
    return "", 0


def _more_resident(
    candidate: Candidate, architecture: Architecture, rig: RigProfile
) -> list[Candidate]:
    """A stream with as many resident layers as fit; none where that is no more."""
    if not candidate.fits:
        return []
    layer_bytes = memory.layer_bytes(candidate.spec, architecture)
    rooms = [
        (room_bytes(card) - rank.needed_bytes) // layer_bytes
        for rank, card in zip(candidate.memory, rig.cards, strict=True)
    ]
    counts = tuple(min(room, architecture.layers) for room in rooms)
    if not any(counts):
        return []
    resident_layers = counts[0] if len(set(counts)) == 1 else counts
    strategy = replace(candidate.spec.strategy, resident_layers=resident_layers)
    return [judge(replace(candidate.spec, strategy=strategy), architecture, rig)]


def settings_text(spec: StrategySpec) -> str:
    """The settings that a candidate may change, as typed on the command line."""
    strategy, size, policies = spec.strategy, spec.size, spec.placement.activations
    settings = [f"strategy={strategy.name}"]
    if strategy.resident_layers:
        resident = strategy.resident_layers
        layers = list(resident) if isinstance(resident, tuple) else resident
        settings.append(f"strategy.resident_layers={str(layers).replace(' ', '')}")
    if spec.schedule.kind == "grouped":
        settings.append(f"schedule.micro_batch_group={spec.schedule.micro_batch_group}")
    settings.append(
        f"activations={policies if isinstance(policies, str) else '[' + ','.join(policies) + ']'}"
    )
    if spec.placement.layer_inputs != "device":
        settings.append(f"layer_inputs={spec.placement.layer_inputs}")
    settings.append(f"loop.micro_batch_size={size.micro_batch_size}")
    settings.append(f"loop.gradient_accumulation_steps={size.gradient_accumulation_steps}")
    return " ".join(settings)
