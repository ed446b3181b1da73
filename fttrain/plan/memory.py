"""Memory of a run on each card and on the host, part by part, before anything is loaded: exact
reservations, by the strategy's own page, for the whole model. ``workspace`` adds the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fttrain.memory.parts import Location, MemoryPart
from fttrain.model.decoder import Architecture
from fttrain.plan.fake import NeedsOtherRanks, PlannedGroup, PlannedLedger
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.strategy.builder import strategy_page
from fttrain.strategy.context import BuildContext
from fttrain.strategy.model_slice import ModelSlice
from fttrain.strategy.spec import StrategySpec

ROOMY_BYTES = 1 << 50  # a card that holds everything: a small model is divided evenly


@dataclass(frozen=True)
class ReservedRank:
    """One rank's context with its reservations, and its part of the model."""

    context: BuildContext
    model_slice: ModelSlice


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by part."""

    rank: int
    layers: int  # computed by the rank
    device: dict[MemoryPart, int]
    host: dict[MemoryPart, int]  # of this rank
    shared: dict[MemoryPart, int]  # in host memory, once for all ranks of the machine

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def reserved_device_bytes(self) -> int:
        """Device bytes that must be free before a run starts."""
        return self.device_bytes - self.device.get(MemoryPart.WORKSPACE, 0)

    @property
    def needed_bytes(self) -> int:
        """Device bytes that the rank needs: the peak, and no less than the reserved parts."""
        return max(self.device_bytes, self.reserved_device_bytes)


def host_bytes(ranks: Sequence[RankMemory], kind: str) -> int:
    """Host memory of all ``ranks`` together; with CPUs, device parts are host memory as well."""
    total = sum(sum(rank.host.values()) for rank in ranks)
    if kind == "cpu":
        total += sum(rank.needed_bytes for rank in ranks)
    return total + sum(ranks[0].shared.values())


def reserve_ranks(
    spec: StrategySpec, architecture: Architecture, kind: str, free_bytes: Sequence[int]
) -> list[ReservedRank]:
    """Reserve the memory of each rank. ``free_bytes``: of each rank's card.

    Raises UserError for settings that do not go together, and where a pipeline's stage does not
    fit its card.
    """
    frozen_format = _frozen_format(spec, architecture)
    page = strategy_page(spec.strategy.name)

    def reserve(rank: int, known: tuple[tuple[float, ...], ...] = ()) -> ReservedRank:
        group = PlannedGroup(rank, len(free_bytes), rank, torch.device(kind), known=known)
        ledger = PlannedLedger(group, free_bytes[rank])
        context = BuildContext(spec, group, architecture, frozen_format, ledger)
        return ReservedRank(context, page.reserve(context))

    ranks = range(len(free_bytes))
    try:
        return [reserve(rank) for rank in ranks]
    except NeedsOtherRanks:  # a pipeline's stages are balanced by figures of all ranks
        known = tuple(_gathered(reserve, rank) for rank in ranks)
    return [reserve(rank, known) for rank in ranks]


def _gathered(reserve: Any, rank: int) -> tuple[float, ...]:
    try:
        reserve(rank, ())
    except NeedsOtherRanks as error:
        return tuple(error.values)
    raise AssertionError("every rank asks, or none")


def layer_bytes(spec: StrategySpec, architecture: Architecture) -> int:
    """Bytes of one frozen layer."""
    return _frozen_format(spec, architecture).layout.size_bytes


def _frozen_format(spec: StrategySpec, architecture: Architecture) -> FrozenFormat:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return architecture.frozen_format(spec.quant, dtype)


def reserved_memory(reserved: ReservedRank) -> RankMemory:
    """The reservations of a rank as its memory."""
    parts: dict[str, dict[MemoryPart, int]] = {location.value: {} for location in Location}
    for reservation in reserved.context.ledger.reservations:
        parts[reservation.location.value][reservation.part] = reservation.size_bytes
    return RankMemory(reserved.context.group.rank, len(reserved.model_slice.layers), **parts)
