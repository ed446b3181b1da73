"""What trains: adapters, their gradients, the optimizer's state; where they are, what they take.

                      on the device                      with optim.offload in host memory
    compute copies    whole                              own part, on its way to the device
    masters, moments  own part                           own part
    gradients         whole; where a step is one group   the same; on the device two of a layer,
                      of micro-batches own part, and     which backward adds to
                      two of a layer

The own part is everything, or with ``optim.shard`` one of as many parts as there are ranks.
"""

import torch
from torch import Tensor

from fttrain.memory.parts import MemoryPart
from fttrain.model.decoder import Decoder
from fttrain.model.layer_adapters import LayerAdapters, OnHost, copy_dtype
from fttrain.optim.flat import FlatLayout, Portion
from fttrain.optim.optimizer import moment_bytes
from fttrain.strategy.gradients import (
    BUFFERS,
    GradientHome,
    PassingGradients,
    ResidentGradients,
)
from fttrain.strategy.recipe import Plan
from fttrain.strategy.sync import GradientSync

FP32_BYTES = 4


def book(plan: Plan, layers: int) -> None:
    """Memory of ``layers``."""
    pool, optim, layout = plan.pool, plan.recipe.optim, layout_of(plan)
    pool.reserve(MemoryPart.ADAPTERS, adapter_bytes(plan) * layers)
    if _passing(plan):
        pool.reserve(MemoryPart.GRADIENT_BUFFERS, BUFFERS * FP32_BYTES * layout.values)
    if optim.offload:
        pool.reserve(MemoryPart.ADAPTER_MASTERS, FP32_BYTES * layout.own_values * layers)
        pool.reserve(MemoryPart.ADAPTER_GRADIENTS, FP32_BYTES * _kept_gradients(plan) * layers)
        pool.reserve(MemoryPart.ADAPTER_COPIES, _copy_dtype(plan).itemsize * layout.own_values * layers)
        pool.reserve(MemoryPart.OPTIMIZER_MOMENTS, moment_bytes(optim, layout.own_values) * layers)


def adapter_bytes(plan: Plan) -> int:
    """What one layer's adapters take on the device for as long as the run lasts."""
    layout, optim = layout_of(plan), plan.recipe.optim
    copies = _copy_dtype(plan).itemsize * layout.values
    if "m" in layout.names:  # squares of frozen rows' norms, and m / n
        copies += 2 * FP32_BYTES * layout.section_values("m")
    if optim.offload:
        return copies
    masters = FP32_BYTES * layout.own_values
    return (
        copies
        + masters
        + moment_bytes(optim, layout.own_values)
        + FP32_BYTES * _kept_gradients(plan)
    )


def _copy_dtype(plan: Plan) -> torch.dtype:
    return copy_dtype(plan.recipe.lora, plan.dtype)


def portion(plan: Plan) -> Portion:
    """What of each layer's adapters this rank updates."""
    group = plan.group
    return Portion(group.rank, group.world_size) if plan.recipe.optim.shard else Portion()


def layout_of(plan: Plan) -> FlatLayout:
    """Of every layer's adapters."""
    meta = torch.device("meta")  # shapes without memory
    groups, lora = plan.architecture.groups, plan.recipe.lora
    return LayerAdapters(0, groups, lora, meta, plan.dtype, portion=portion(plan)).layout


def adapters(plan: Plan, layers: range) -> list[LayerAdapters]:
    """Of each of ``layers``, at their start."""
    groups, recipe, device = plan.architecture.groups, plan.recipe, plan.group.device
    places = _on_host(plan, len(layers)) if recipe.optim.offload else [None] * len(layers)
    made = [
        LayerAdapters(layer, groups, recipe.lora, device, plan.dtype, place, portion(plan))
        for layer, place in zip(layers, places, strict=True)
    ]
    for own in made:
        own.reset(recipe.seed)
    return made


def _on_host(plan: Plan, layers: int) -> list[OnHost]:
    """Where masters and outgoing copies of each layer are in host memory."""
    masters = _by_layer(plan.pool.allocate(MemoryPart.ADAPTER_MASTERS), torch.float32, layers)
    copies = _by_layer(plan.pool.allocate(MemoryPart.ADAPTER_COPIES), _copy_dtype(plan), layers)
    return [OnHost(*own) for own in zip(masters, copies, strict=True)]


def gradients(plan: Plan, built: Decoder, sync: GradientSync) -> GradientHome:
    """Where the adapters' gradients live."""
    adapters, device = [layer.adapters for layer in built.layers], plan.group.device
    if not _passing(plan):
        return ResidentGradients(adapters, sync)
    if plan.recipe.optim.offload:
        places = _by_layer(plan.pool.allocate(MemoryPart.ADAPTER_GRADIENTS), torch.float32, len(adapters))
    else:
        places = list(torch.zeros(len(adapters), _kept_gradients(plan), device=device).unbind(0))
    return PassingGradients(adapters, sync, device, places)


def _passing(plan: Plan) -> bool:
    """Whether the device holds no more than a few whole gradients."""
    return plan.recipe.optim.offload or (portion(plan).world_size > 1 and _one_group(plan))


def _kept_gradients(plan: Plan) -> int:
    """fp32 values that are kept of one layer's gradient: all while groups still add to them."""
    layout = layout_of(plan)
    return layout.own_values if _one_group(plan) else layout.values


def _one_group(plan: Plan) -> bool:
    """A layer's gradient is complete as its first backward ends, also where micro-batches are
    divided and there are more of them.
    """
    return (plan.recipe.schedule.kind, plan.recipe.schedule.group) == ("grouped", "all")


def _by_layer(buffer: Tensor, dtype: torch.dtype, layers: int) -> list[Tensor]:
    """uint8 host memory -> ``dtype`` (values,) for each layer."""
    return list(buffer.view(dtype).view(layers, -1).unbind(0))
