"""The winner's memory by one run on fake tensors with all of the model's layers.

Candidates are extrapolated along straight lines from small models; the chosen one runs in full.
"""

from collections.abc import Sequence
from dataclasses import replace

from fttrain.memory.parts import MemoryPart
from fttrain.model.decoder import Architecture
from fttrain.plan import memory, workspace
from fttrain.plan.memory import RankMemory, ReservedRank
from fttrain.strategy.spec import StrategySpec

TOLERANCE = 0.01  # of the peak: a smaller error of the extrapolation stays
MOST_PASSES = 160  # layers x micro-batches: about 15 s of a laptop's CPU


def confirmed(
    ranks: Sequence[RankMemory],
    spec: StrategySpec,
    architecture: Architecture,
    kind: str,
    free_bytes: Sequence[int],
) -> list[RankMemory]:
    """``ranks``, which ``memory`` extrapolated, with the full run's figure where it differs.

    Each different rank runs all of its layers, with the micro-batches of ``spec`` or as many as
    ``MOST_PASSES`` allows, but at least the number from which on memory grows evenly.
    """
    steps = _steps(spec, architecture.layers, len(ranks))
    shorter = replace(spec, size=replace(spec.size, gradient_accumulation_steps=steps))
    # The CPU stands in for the card.
    reserved = memory.reserve_ranks(shorter, architecture, "cpu", free_bytes)
    extrapolated = workspace.with_workspace(
        [memory.reserved_memory(rank) for rank in reserved], shorter, architecture, kind
    )
    runs: dict[str, int] = {}
    return [
        _corrected(rank, line.device[MemoryPart.WORKSPACE], _beyond_reserved(rank_plan, kind, runs))
        for rank, line, rank_plan in zip(ranks, extrapolated, reserved, strict=True)
    ]


def _steps(spec: StrategySpec, layers: int, world_size: int) -> int:
    """Micro-batches of a rank's step in the full run."""
    passes = layers * (world_size if spec.strategy.name == "pipeline" else 1)
    most = max(MOST_PASSES // passes, workspace.evenly_from(spec, layers, world_size))
    return min(spec.size.gradient_accumulation_steps, most)


def _beyond_reserved(reserved: ReservedRank, kind: str, runs: dict[str, int]) -> int:
    """Bytes beyond the reservations of one rank. Ranks with equal reservations and layers run once:
    ``runs`` has their result.
    """
    key = str((len(reserved.model_slice.layers), reserved.context.ledger.reservations))
    if key not in runs:
        runs[key] = workspace.beyond_reserved(reserved.context, kind)
    return runs[key]


def _corrected(rank: RankMemory, expected_bytes: int, full_bytes: int) -> RankMemory:
    error_bytes = full_bytes - expected_bytes
    if abs(error_bytes) <= TOLERANCE * rank.device_bytes:
        return rank
    return replace(
        rank,
        device={
            **rank.device,
            MemoryPart.WORKSPACE: rank.device[MemoryPart.WORKSPACE] + error_bytes,
        },
    )
