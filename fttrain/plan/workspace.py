"""Workspace of a run: memory of the real step on fake tensors (``fake.run``) beyond the reserved
parts. It is run with a few layers and micro-batches, and extrapolated along straight lines.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fttrain.memory.parts import MemoryPart
from fttrain.model.decoder import Architecture
from fttrain.plan import fake
from fttrain.plan.memory import ROOMY_BYTES, RankMemory, reserve_ranks
from fttrain.schedule.pipeline_p2p import AHEAD
from fttrain.store.activations import UNDER_WAY
from fttrain.strategy.config import StrategyConfig
from fttrain.strategy.context import BuildContext
from fttrain.strategy.spec import StrategySpec

STANDS_FOR_GROUPED = StrategyConfig("stream")


def with_workspace(
    ranks: Sequence[RankMemory], spec: StrategySpec, architecture: Architecture, kind: str
) -> list[RankMemory]:
    """``ranks`` with the workspace of kernels and of the tensors between them."""
    together = _together(spec, len(ranks))
    workspaces = Workspaces.of(spec, architecture, kind, len(ranks))
    return [
        replace(
            rank,
            device={
                **rank.device,
                MemoryPart.WORKSPACE: workspaces.at(rank.rank, rank.layers, together),
            },
        )
        for rank in ranks
    ]


@dataclass(frozen=True)
class _Lines:
    """Bytes as a bilinear function of layers and of micro-batches that pass a layer together."""

    start: float
    of_layer: float
    of_micro_batch: float
    of_both: float

    def at(self, layers: int, micro_batches: int) -> int:
        of_layer = self.of_layer + self.of_both * micro_batches
        return round(self.start + self.of_micro_batch * micro_batches + of_layer * layers)


@dataclass(frozen=True)
class Workspaces:
    """Bytes of a rank's step beyond its reservations: negative where reserved parts never exist at
    the same time.
    """

    by_policy: tuple[
        tuple[_Lines, ...], ...
    ]  # for each policy: the first, a middle and the last rank
    world_size: int

    def at(self, rank: int, layers: int, micro_batches: int) -> int:
        """Workspace of ``rank``: that of the policy that needs most."""
        index = 0 if rank == 0 else -1 if rank == self.world_size - 1 else 1
        return max(lines[index].at(layers, micro_batches) for lines in self.by_policy)

    @staticmethod
    def of(
        spec: StrategySpec, architecture: Architecture, kind: str, world_size: int
    ) -> "Workspaces":
        """Workspaces measured on small models of the same shape.

        Strategies with the ``grouped`` schedule differ in their reservations alone: one stands for
        all of them.
        """
        strategy = spec.strategy if spec.strategy.name == "pipeline" else STANDS_FOR_GROUPED
        together = _together(spec, world_size)

        def alone(policy: str) -> StrategySpec:
            policy_spec = replace(spec, strategy=strategy, placement=_only(spec, policy))
            # More micro-batches are extrapolated: specs that differ in their number share one cache
            # entry.
            count = (
                together if strategy.name == "pipeline" else min(together, _few(policy_spec) + 1)
            )
            return replace(policy_spec, size=replace(spec.size, gradient_accumulation_steps=count))

        policies = dict.fromkeys(spec.placement.policies(architecture.layers))
        return Workspaces(
            tuple(
                _rank_lines(alone(policy), _Shape(architecture.config), kind, world_size)
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
    fields: dict[str, Any] = with_layers(config, layers).to_dict()
    return fields


def with_layers(config: Any, layers: int) -> Any:
    """transformers' ``config`` of a model of the same shape with so many layers."""
    config = copy.deepcopy(config)
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = layers
    if types:
        config.layer_types = [types[layer % len(types)] for layer in range(layers)]
    return config


@functools.lru_cache(maxsize=256)
def _rank_lines(
    spec: StrategySpec, shape: _Shape, kind: str, world_size: int
) -> tuple[_Lines, ...]:
    """Lines of the first, a middle and the last rank. ``spec``: one policy for all layers."""
    if spec.strategy.name != "pipeline":
        lines = _lines_of_rank(spec, shape, kind, world_size, 0)  # all ranks are alike
        return (lines,) * min(world_size, 3)
    ranks = sorted({0, 1, world_size - 1} & set(range(world_size)))
    return tuple(_lines_of_rank(spec, shape, kind, world_size, rank) for rank in ranks)


def _lines_of_rank(
    spec: StrategySpec, shape: _Shape, kind: str, world_size: int, rank: int
) -> _Lines:
    pipeline = spec.strategy.name == "pipeline"
    together = spec.size.gradient_accumulation_steps
    few = together if pipeline else min(together, _few(spec))
    shallow = _shallow(spec)
    counts = (few, few + 1) if together > few else (few,)
    points = [(layers, count) for count in counts for layers in (shallow, shallow + 1)]
    measured = []
    for layers, micro_batches in points:
        size = replace(spec.size, gradient_accumulation_steps=micro_batches)
        a = Architecture(with_layers(shape.config, layers * (world_size if pipeline else 1)))
        point_spec = replace(spec, size=size)
        context = reserve_ranks(point_spec, a, "cpu", [ROOMY_BYTES] * world_size)[rank].context
        measured.append(beyond_reserved(context, kind))
    grow = together > few  # else no other number of micro-batches is needed
    rows = [[1, layers, grow * count, grow * layers * count] for layers, count in points]
    solved, *_ = np.linalg.lstsq(np.array(rows, float), np.array(measured, float), rcond=None)
    return _Lines(*(float(value) for value in solved))


def _shallow(spec: StrategySpec) -> int:
    """The number of layers (of a pipeline: of a stage) from which on memory grows evenly. The first
    and the last layer hold other tensors than those between. With ``offload`` a pipeline's stage
    has the tensors of two layers in flight where forward turns into backward.
    """
    offloads = spec.placement.activations == "offload"
    return 3 if spec.strategy.name == "pipeline" and offloads else 2


def _together(spec: StrategySpec, stages: int) -> int:
    """Micro-batches of a rank's step that matter to memory: those of a group; for a pipeline as
    many as fill it and post all the receives that it posts ahead.
    """
    steps = spec.size.gradient_accumulation_steps
    if spec.strategy.name == "pipeline":
        return min(steps, -(-(stages + AHEAD) // stages))
    return spec.schedule.size(steps)


def evenly_from(spec: StrategySpec, layers: int, world_size: int) -> int:
    """Micro-batches of a rank's step from which on the lines give its memory."""
    together = _together(spec, world_size)
    if spec.strategy.name == "pipeline":
        return together
    policies = set(spec.placement.policies(layers))
    few = [_few(replace(spec, placement=_only(spec, policy))) for policy in policies]
    return min(together, max(few) + 1)


def _few(spec: StrategySpec) -> int:
    """Micro-batches from which on memory grows evenly: with ``offload`` as many as have transfers
    in flight.
    """
    return UNDER_WAY + 2 if spec.placement.activations == "offload" else 1


def beyond_reserved(context: BuildContext, kind: str) -> int:
    """Bytes of the step of ``context`` beyond its device reservations. Its device is the CPU, which
    stands in for a card of ``kind``.
    """
    peak = fake.run(context, kind)
    taken = max(peak.step_bytes, peak.building_bytes) if kind == "cpu" else peak.step_bytes
    return taken - context.ledger.device_bytes
