"""What a run takes of each card and of the host, part by part, before anything is loaded.

reserved       by the strategy's own page, exactly, for the whole model
workspace    what the real step takes on fake tensors (``fake.run``) beyond what is reserved: with a
             few layers and micro-batches, and from there on straight lines
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fttrain.memory.parts import Location, MemoryPart
from fttrain.model.decoder import Architecture
from fttrain.plan import fake
from fttrain.plan.fake import AsksOthers, PlannedGroup, PlannedLedger
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.schedule.pipeline_p2p import AHEAD
from fttrain.store.activations import UNDER_WAY
from fttrain.strategy.builder import strategy_page
from fttrain.strategy.config import StrategyConfig
from fttrain.strategy.model_slice import ModelSlice
from fttrain.strategy.spec import BuildContext, StrategySpec

STANDS_FOR_GROUPED = StrategyConfig("stream")
ROOMY_BYTES = 1 << 50  # of a card that everything fits: a small model is divided evenly


@dataclass(frozen=True)
class ReservedRank:
    """One rank's plan, reserved, and its part of the model."""

    context: BuildContext
    model_slice: ModelSlice


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by part."""

    rank: int
    layers: int  # that it computes
    device: dict[MemoryPart, int]
    host: dict[MemoryPart, int]  # its own
    shared: dict[MemoryPart, int]  # in host memory, once for all ranks of the machine

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def booked_bytes(self) -> int:
        """Of the device, what a run refuses to start without."""
        return self.device_bytes - self.device.get(MemoryPart.WORKSPACE, 0)

    @property
    def needed_bytes(self) -> int:
        """Of the device: the peak, and no less than what is reserved."""
        return max(self.device_bytes, self.booked_bytes)


def host_bytes(ranks: Sequence[RankMemory], kind: str) -> int:
    """Host memory of all ``ranks`` together; of CPUs what stands for cards is part of it."""
    own = sum(sum(rank.host.values()) for rank in ranks)
    if kind == "cpu":
        own += sum(rank.needed_bytes for rank in ranks)
    return own + sum(ranks[0].shared.values())


def reserve_ranks(
    spec: StrategySpec, architecture: Architecture, kind: str, free_bytes: Sequence[int]
) -> list[ReservedRank]:
    """For each rank; ``free_bytes``: what each one's card has for it.

    Raises UserError for settings that do not go together, and where a pipeline's stage does not
    hold its part.
    """
    frozen_format = _frozen_format(spec, architecture)
    page = strategy_page(spec.strategy.name)

    def booked(rank: int, known: tuple[tuple[float, ...], ...] = ()) -> ReservedRank:
        group = PlannedGroup(rank, len(free_bytes), rank, torch.device(kind), known=known)
        ledger = PlannedLedger(group, free_bytes[rank])
        context = BuildContext(spec, group, architecture, frozen_format, ledger)
        return ReservedRank(context, page.reserve(context))

    ranks = range(len(free_bytes))
    try:
        return [booked(rank) for rank in ranks]
    except AsksOthers:  # a pipeline's stages are balanced by what all of them say
        known = tuple(_said(booked, rank) for rank in ranks)
    return [booked(rank, known) for rank in ranks]


def _said(booked: Any, rank: int) -> tuple[float, ...]:
    try:
        booked(rank, ())
    except AsksOthers as asked:
        return tuple(asked.own)
    raise AssertionError("every rank asks, or none")


def layer_bytes(spec: StrategySpec, architecture: Architecture) -> int:
    """Of one frozen layer."""
    return _frozen_format(spec, architecture).layout.size_bytes


def _frozen_format(spec: StrategySpec, architecture: Architecture) -> FrozenFormat:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return architecture.frozen_format(spec.quant, dtype)


def reserved_memory(booked: ReservedRank) -> RankMemory:
    """All that is reserved on a rank."""
    parts: dict[str, dict[MemoryPart, int]] = {location.value: {} for location in Location}
    for reservation in booked.context.ledger.reservations:
        parts[reservation.location.value][reservation.part] = reservation.size_bytes
    return RankMemory(booked.context.group.rank, len(booked.model_slice.layers), **parts)


def with_workspace(
    booked: Sequence[RankMemory], spec: StrategySpec, architecture: Architecture, kind: str
) -> list[RankMemory]:
    """``reserved`` and what kernels and what they pass on take beside it."""
    together = _together(spec, len(booked))
    workspaces = Workspaces.of(spec, architecture, kind, len(booked))
    return [
        replace(
            own,
            device={
                **own.device,
                MemoryPart.WORKSPACE: workspaces.at(own.rank, own.layers, together),
            },
        )
        for own in booked
    ]


@dataclass(frozen=True)
class _Lines:
    """Bytes as they grow with layers, with micro-batches that pass a layer together, and with one
    for each of the other.
    """

    start: float
    of_layer: float
    of_micro_batch: float
    of_both: float

    def at(self, layers: int, micro_batches: int) -> int:
        of_layer = self.of_layer + self.of_both * micro_batches
        return round(self.start + self.of_micro_batch * micro_batches + of_layer * layers)


@dataclass(frozen=True)
class Workspaces:
    """What a rank's step takes beyond its books: less than nothing where parts that are reserved
    are not there at the same time.
    """

    by_policy: tuple[tuple[_Lines, ...], ...]  # of each, the first, a middle and the last rank
    world_size: int

    def at(self, rank: int, layers: int, micro_batches: int) -> int:
        """Of ``rank``: that of its hungriest policy."""
        place = 0 if rank == 0 else -1 if rank == self.world_size - 1 else 1
        return max(lines[place].at(layers, micro_batches) for lines in self.by_policy)

    @staticmethod
    def of(
        spec: StrategySpec, architecture: Architecture, kind: str, world_size: int
    ) -> "Workspaces":
        """Measured on small models of the same shape.

        What strategies of ``grouped`` differ in is reserved: one stands for all of them.
        """
        strategy = spec.strategy if spec.strategy.name == "pipeline" else STANDS_FOR_GROUPED
        together = _together(spec, world_size)

        def alone(policy: str) -> StrategySpec:
            own = replace(spec, strategy=strategy, placement=_only(spec, policy))
            # More micro-batches are extrapolated: steps that differ in their number alone are one.
            count = together if strategy.name == "pipeline" else min(together, _few(own) + 1)
            return replace(own, size=replace(spec.size, gradient_accumulation_steps=count))

        policies = dict.fromkeys(spec.placement.policies(architecture.layers))
        return Workspaces(
            tuple(
                _of_ranks(alone(policy), _Shape(architecture.config), kind, world_size)
                for policy in policies
            ),
            world_size,
        )


def _only(spec: StrategySpec, policy: str) -> Any:
    placement = replace(spec.placement, activations="recompute")
    if policy == "recompute":
        return placement
    return replace(placement, activations=policy, layer_inputs="device")


class _Shape:
    """A model's configuration as a key: equal for equal shapes, whatever their layers."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._key = str(sorted(_plain(config, 1).items(), key=str))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shape) and self._key == other._key


def _plain(config: Any, layers: int) -> dict[str, Any]:
    found: dict[str, Any] = with_layers(config, layers).to_dict()
    return found


def with_layers(config: Any, layers: int) -> Any:
    """transformers' ``config`` of a model of the same shape with so many layers."""
    config = copy.deepcopy(config)
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = layers
    if types:
        config.layer_types = [types[layer % len(types)] for layer in range(layers)]
    return config


@functools.lru_cache(maxsize=256)
def _of_ranks(spec: StrategySpec, shape: _Shape, kind: str, world_size: int) -> tuple[_Lines, ...]:
    """Of the first, a middle and the last rank. ``spec``: one policy for all layers."""
    if spec.strategy.name != "pipeline":
        one = _of_rank(spec, shape, kind, world_size, 0)  # ranks differ in nothing
        return (one,) * min(world_size, 3)
    ranks = sorted({0, 1, world_size - 1} & set(range(world_size)))
    return tuple(_of_rank(spec, shape, kind, world_size, rank) for rank in ranks)


def _of_rank(spec: StrategySpec, shape: _Shape, kind: str, world_size: int, rank: int) -> _Lines:
    pipeline = spec.strategy.name == "pipeline"
    together = spec.size.gradient_accumulation_steps
    few = together if pipeline else min(together, _few(spec))
    shallow = _shallow(spec)
    counts = (few, few + 1) if together > few else (few,)
    points = [(layers, count) for count in counts for layers in (shallow, shallow + 1)]
    found = []
    for layers, micro_batches in points:
        size = replace(spec.size, gradient_accumulation_steps=micro_batches)
        a = Architecture(with_layers(shape.config, layers * (world_size if pipeline else 1)))
        own = replace(spec, size=size)
        context = reserve_ranks(own, a, "cpu", [ROOMY_BYTES] * world_size)[rank].context
        found.append(beyond_reserved(context, kind))
    grow = together > few  # else nothing is asked of other numbers of micro-batches
    rows = [[1, layers, grow * count, grow * layers * count] for layers, count in points]
    solved, *_ = np.linalg.lstsq(np.array(rows, float), np.array(found, float), rcond=None)
    return _Lines(*(float(value) for value in solved))


def _shallow(spec: StrategySpec) -> int:
    """Layers, of a pipeline those of a stage, from which on memory grows evenly: the first and the
    last one keep other things than those between. With ``offload`` a pipeline's stage has the
    tensors of two under way as it turns round.
    """
    offloads = spec.placement.activations == "offload"
    return 3 if spec.strategy.name == "pipeline" and offloads else 2


def _together(spec: StrategySpec, stages: int) -> int:
    """Micro-batches of a rank's step as far as memory knows them: those of a group, and of a
    pipeline as many as fill it and open all the receives that it opens ahead.
    """
    steps = spec.size.gradient_accumulation_steps
    if spec.strategy.name == "pipeline":
        return min(steps, -(-(stages + AHEAD) // stages))
    return spec.schedule.size(steps)


def evenly_from(spec: StrategySpec, layers: int, world_size: int) -> int:
    """Micro-batches of a rank's step from which on memory is that of the lines."""
    together = _together(spec, world_size)
    if spec.strategy.name == "pipeline":
        return together
    policies = set(spec.placement.policies(layers))
    few = [_few(replace(spec, placement=_only(spec, policy))) for policy in policies]
    return min(together, max(few) + 1)


def _few(spec: StrategySpec) -> int:
    """Micro-batches from which on memory grows evenly: with ``offload`` as many as have tensors on
    the device that leave or come back.
    """
    return UNDER_WAY + 2 if spec.placement.activations == "offload" else 1


def beyond_reserved(context: BuildContext, kind: str) -> int:
    """What the step of ``context``, on the CPU in place of a card of ``kind``, takes beyond what is
    reserved on the device.
    """
    peak = fake.run(context, kind)
    taken = max(peak.step_bytes, peak.building_bytes) if kind == "cpu" else peak.step_bytes
    return taken - context.ledger.device_bytes
