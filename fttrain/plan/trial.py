"""A few real steps of a small model of the same shape: what a layer and the head take on this
device beside their GEMMs, and what a process takes before its first tensor.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.host import peak_host_bytes
from fttrain.model.decoder import Architecture
from fttrain.plan.fake import full_batch
from fttrain.plan.live_bytes import LiveBytes
from fttrain.plan.memory import with_layers
from fttrain.plan.random_base import RandomBase
from fttrain.rig.card import beside_allocator_bytes
from fttrain.rig.timing import median_s
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.builder import StrategyBuilder
from fttrain.strategy.config import Placement, StrategyConfig
from fttrain.strategy.spec import StrategySpec

LAYERS = 4
MICRO_BATCHES = 2
BUDGET_S = 4.0  # of each median; timing.py takes a few runs at least


@dataclass(frozen=True)
class Trial:
    """What was measured. Seconds of one micro-batch."""

    layer_s: float  # forward, recomputed, backward
    head_s: float  # loss and its gradient, every token a target
    overhead_bytes: int | None = None  # of host memory, of a process on the CPU; None elsewhere
    # That torch's allocator on a GPU held beyond live tensors: what it rounds up and cannot give
    # out again, and workspaces of libraries; with them the kernels that the steps had loaded. None
    # elsewhere
    allocator_bytes: int | None = None


def recipe_of(spec: StrategySpec) -> StrategySpec:
    """``spec``'s shapes, everything on the device and nothing that another rank is needed for."""
    return replace(
        spec,
        strategy=StrategyConfig("replicate"),
        schedule=ScheduleConfig(),
        placement=Placement(),
        optim=replace(spec.optim, offload=False, shard=False),
        size=replace(spec.size, gradient_accumulation_steps=MICRO_BATCHES),
    )


def take(spec: StrategySpec, config: Any, device: torch.device) -> Trial:
    """Of ``recipe_of(recipe)`` with a model of the shape of transformers' ``config``.

    Ranks that share a device or a host take it at the same time.
    """
    spec = recipe_of(spec)
    architecture = Architecture(with_layers(config, LAYERS))
    dtype: torch.dtype = getattr(torch, spec.dtype)
    frozen_format = architecture.frozen_format(spec.quant, dtype)
    alone = RankGroup(0, 1, 0, device)
    on_cpu = device.type == "cpu"
    beside_bytes = 0
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats(device)
        beside_bytes = beside_allocator_bytes(device)
    with LiveBytes(device.type) as live:
        blueprint = StrategyBuilder(spec, architecture, frozen_format, alone)
        strategy = blueprint.build(RandomBase(LAYERS, frozen_format), lambda done, total: None)
        _step(strategy, spec, None)
    if on_cpu:
        held_bytes = peak_host_bytes()
    else:
        loaded_bytes = beside_allocator_bytes(device) - beside_bytes
        held_bytes = torch.cuda.max_memory_reserved(device) + loaded_bytes
    beyond_bytes = held_bytes - live.peak
    # With a single target there is next to nothing to do behind the layers.
    layers_s = median_s(lambda: _step(strategy, spec, 1), device, BUDGET_S)
    whole_s = median_s(lambda: _step(strategy, spec, None), device, BUDGET_S)
    return Trial(
        layers_s / (LAYERS * MICRO_BATCHES),
        max(0.0, whole_s - layers_s) / MICRO_BATCHES,
        overhead_bytes=beyond_bytes if on_cpu else None,
        allocator_bytes=None if on_cpu else beyond_bytes,
    )


def _step(strategy: Any, spec: StrategySpec, targets: int | None) -> None:
    batches = [full_batch(spec.size, index, targets) for index in range(MICRO_BATCHES)]
    strategy.train_step(batches, 0, spec.optim.lr, lambda loss, norm: True)
