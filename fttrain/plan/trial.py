"""A few real steps of a small model of the same shape: the time of a layer and of the head on this
device outside GEMMs, and the memory of a process before its first tensor.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.host import peak_host_bytes
from fttrain.model.decoder import Architecture
from fttrain.plan.fake import full_batch
from fttrain.plan.live_bytes import LiveBytes
from fttrain.plan.random_base import RandomBase
from fttrain.plan.workspace import with_layers
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
    """The measured figures. Seconds are those of one micro-batch."""

    layer_s: float  # forward, recompute, backward
    head_s: float  # loss and its gradient, every token a target
    overhead_bytes: int | None = None  # host memory of a process on the CPU; None elsewhere
    # Bytes that torch's allocator on a GPU held beyond live tensors (rounding, fragments,
    # workspaces of libraries), and the kernels loaded by the steps; None elsewhere
    allocator_bytes: int | None = None


def trial_spec(spec: StrategySpec) -> StrategySpec:
    """``spec`` with everything on the device, and without any need of another rank."""
    return replace(
        spec,
        strategy=StrategyConfig("replicate"),
        schedule=ScheduleConfig(),
        placement=Placement(),
        optim=replace(spec.optim, offload=False, shard=False),
        size=replace(spec.size, gradient_accumulation_steps=MICRO_BATCHES),
    )


def run_trial(spec: StrategySpec, config: Any, device: torch.device) -> Trial:
    """Measure ``trial_spec(spec)`` with a model of the shape of transformers' ``config``.

    Ranks that share a device or a host call it at the same time.
    """
    spec = trial_spec(spec)
    architecture = Architecture(with_layers(config, LAYERS))
    dtype: torch.dtype = getattr(torch, spec.dtype)
    frozen_format = architecture.frozen_format(spec.quant, dtype)
    alone = RankGroup(0, 1, 0, device)
    on_cpu = device.type == "cpu"
    earlier_bytes = 0
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats(device)
        earlier_bytes = beside_allocator_bytes(device)
    with LiveBytes(device.type) as live:
        builder = StrategyBuilder(spec, architecture, frozen_format, alone)
        strategy = builder.build(RandomBase(LAYERS, frozen_format), lambda done, total: None)
        _step(strategy, spec, None)
    if on_cpu:
        held_bytes = peak_host_bytes()
    else:
        loaded_bytes = beside_allocator_bytes(device) - earlier_bytes
        held_bytes = torch.cuda.max_memory_reserved(device) + loaded_bytes
    beyond_bytes = held_bytes - live.peak
    # With a single target the head takes next to no time.
    layers_s = median_s(lambda: _step(strategy, spec, 1), device, BUDGET_S)
    full_s = median_s(lambda: _step(strategy, spec, None), device, BUDGET_S)
    return Trial(
        layers_s / (LAYERS * MICRO_BATCHES),
        max(0.0, full_s - layers_s) / MICRO_BATCHES,
        overhead_bytes=beyond_bytes if on_cpu else None,
        allocator_bytes=None if on_cpu else beyond_bytes,
    )


def _step(strategy: Any, spec: StrategySpec, targets: int | None) -> None:
    batches = [full_batch(spec.size, index, targets) for index in range(MICRO_BATCHES)]
    strategy.train_step(batches, 0, spec.optim.lr, lambda loss, norm: True)
