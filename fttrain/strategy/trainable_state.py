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
from fttrain.optim.flat import FlatLayout, Shard
from fttrain.optim.optimizer import moment_bytes
from fttrain.strategy.grad_reduce import GradientSync
from fttrain.strategy.gradients import (
    BUFFERS,
    DoubleBufferedGradients,
    GradientBuffers,
    ResidentGradients,
)
from fttrain.strategy.spec import BuildContext

FP32_BYTES = 4


def reserve_trainable(context: BuildContext, layers: int) -> None:
    """Memory of ``layers``."""
    ledger, optim, layout = context.ledger, context.spec.optim, layout_of(context)
    ledger.reserve(MemoryPart.ADAPTERS, adapter_bytes(context) * layers)
    if _double_buffered(context):
        ledger.reserve(MemoryPart.GRADIENT_BUFFERS, BUFFERS * FP32_BYTES * layout.values)
    if optim.offload:
        ledger.reserve(MemoryPart.ADAPTER_MASTERS, FP32_BYTES * layout.own_values * layers)
        ledger.reserve(MemoryPart.ADAPTER_GRADIENTS, FP32_BYTES * _kept_gradients(context) * layers)
        ledger.reserve(
            MemoryPart.ADAPTER_COPIES, _copy_dtype(context).itemsize * layout.own_values * layers
        )
        ledger.reserve(
            MemoryPart.OPTIMIZER_MOMENTS, moment_bytes(optim, layout.own_values) * layers
        )


def adapter_bytes(context: BuildContext) -> int:
    """What one layer's adapters take on the device for as long as the run lasts."""
    layout, optim = layout_of(context), context.spec.optim
    copies = _copy_dtype(context).itemsize * layout.values
    if "m" in layout.names:  # squares of frozen rows' norms, and m / n
        copies += 2 * FP32_BYTES * layout.section_values("m")
    if optim.offload:
        return copies
    masters = FP32_BYTES * layout.own_values
    return (
        copies
        + masters
        + moment_bytes(optim, layout.own_values)
        + FP32_BYTES * _kept_gradients(context)
    )


def _copy_dtype(context: BuildContext) -> torch.dtype:
    return copy_dtype(context.spec.lora, context.dtype)


def optimizer_shard(context: BuildContext) -> Shard:
    """What of each layer's adapters this rank updates."""
    group = context.group
    return Shard(group.rank, group.world_size) if context.spec.optim.shard else Shard()


def layout_of(context: BuildContext) -> FlatLayout:
    """Of every layer's adapters."""
    meta = torch.device("meta")  # shapes without memory
    groups, lora = context.architecture.groups, context.spec.lora
    return LayerAdapters(
        0, groups, lora, meta, context.dtype, portion=optimizer_shard(context)
    ).layout


def adapters(context: BuildContext, layers: range) -> list[LayerAdapters]:
    """Of each of ``layers``, at their start."""
    groups, spec, device = context.architecture.groups, context.spec, context.group.device
    places = _on_host(context, len(layers)) if spec.optim.offload else [None] * len(layers)
    made = [
        LayerAdapters(
            layer, groups, spec.lora, device, context.dtype, place, optimizer_shard(context)
        )
        for layer, place in zip(layers, places, strict=True)
    ]
    for own in made:
        own.reset(spec.seed)
    return made


def _on_host(context: BuildContext, layers: int) -> list[OnHost]:
    """Where masters and outgoing copies of each layer are in host memory."""
    masters = _by_layer(context.ledger.allocate(MemoryPart.ADAPTER_MASTERS), torch.float32, layers)
    copies = _by_layer(
        context.ledger.allocate(MemoryPart.ADAPTER_COPIES), _copy_dtype(context), layers
    )
    return [OnHost(*own) for own in zip(masters, copies, strict=True)]


def gradients(context: BuildContext, built: Decoder, sync: GradientSync) -> GradientBuffers:
    """Where the adapters' gradients live."""
    adapters, device = [layer.adapters for layer in built.layers], context.group.device
    if not _double_buffered(context):
        return ResidentGradients(adapters, sync)
    if context.spec.optim.offload:
        places = _by_layer(
            context.ledger.allocate(MemoryPart.ADAPTER_GRADIENTS), torch.float32, len(adapters)
        )
    else:
        places = list(torch.zeros(len(adapters), _kept_gradients(context), device=device).unbind(0))
    return DoubleBufferedGradients(adapters, sync, device, places)


def _double_buffered(context: BuildContext) -> bool:
    """Whether the device holds no more than a few whole gradients."""
    return context.spec.optim.offload or (
        optimizer_shard(context).world_size > 1 and _one_group(context)
    )


def _kept_gradients(context: BuildContext) -> int:
    """fp32 values that are kept of one layer's gradient: all while groups still add to them."""
    layout = layout_of(context)
    return layout.own_values if _one_group(context) else layout.values


def _one_group(context: BuildContext) -> bool:
    """A layer's gradient is complete as its first backward ends, also where micro-batches are
    divided and there are more of them.
    """
    return (context.spec.schedule.kind, context.spec.schedule.micro_batch_group) == (
        "grouped",
        "all",
    )


def _by_layer(buffer: Tensor, dtype: torch.dtype, layers: int) -> list[Tensor]:
    """uint8 host memory -> ``dtype`` (values,) for each layer."""
    return list(buffer.view(dtype).view(layers, -1).unbind(0))
