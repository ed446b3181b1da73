"""The winner's memory by one run on fake tensors with all of the model's layers.

Straight lines through small models say what all candidates take; what is chosen is looked at whole.
"""

from collections.abc import Sequence
from dataclasses import replace

from fttrain.memory.parts import MemoryPart
from fttrain.model.decoder import Architecture
from fttrain.plan import memory
from fttrain.plan.memory import RankMemory, ReservedRank
from fttrain.strategy.spec import StrategySpec

TOLERANCE = 0.01  # of the peak: up to here the lines' figure stays
MOST_PASSES = 160  # of a layer by a micro-batch: about 15 s of a laptop's CPU


def confirmed(
    taken: Sequence[RankMemory],
    spec: StrategySpec,
    architecture: Architecture,
    kind: str,
    free_bytes: Sequence[int],
) -> list[RankMemory]:
    """``taken``, which ``memory`` extrapolated, with the full run's figure where it is another one.

    Each different rank runs all of its layers, with the micro-batches of the recipe, or as many of
    them as ``MOST_PASSES`` allows, but never fewer than memory grows evenly from.
    """
    steps = _steps(spec, architecture.layers, len(taken))
    own = replace(spec, size=replace(spec.size, gradient_accumulation_steps=steps))
    booked = memory.reserve_ranks(
        own, architecture, "cpu", free_bytes
    )  # which stands in for the card
    expected = memory.with_workspace(
        [memory.reserved_memory(rank) for rank in booked], own, architecture, kind
    )
    ran: dict[str, int] = {}
    return [
        _corrected(rank, line.device[MemoryPart.WORKSPACE], _beyond_books(of_rank, kind, ran))
        for rank, line, of_rank in zip(taken, expected, booked, strict=True)
    ]


def _steps(spec: StrategySpec, layers: int, world_size: int) -> int:
    """Micro-batches of a rank's step in the full run."""
    passes = layers * (world_size if spec.strategy.name == "pipeline" else 1)
    most = max(MOST_PASSES // passes, memory.evenly_from(spec, layers, world_size))
    return min(spec.size.gradient_accumulation_steps, most)


def _beyond_books(booked: ReservedRank, kind: str, ran: dict[str, int]) -> int:
    """Of one rank; those whose books and layers are the same are run once, ``ran`` has them."""
    key = str((len(booked.model_slice.layers), booked.context.ledger.reservations))
    if key not in ran:
        ran[key] = memory.beyond_reserved(booked.context, kind)
    return ran[key]


def _corrected(rank: RankMemory, expected_bytes: int, found_bytes: int) -> RankMemory:
    wrong_by = found_bytes - expected_bytes
    if abs(wrong_by) <= TOLERANCE * rank.device_bytes:
        return rank
    return replace(
        rank,
        device={**rank.device, MemoryPart.WORKSPACE: rank.device[MemoryPart.WORKSPACE] + wrong_by},
    )
