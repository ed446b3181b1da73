"""Trainable state: adapters, their gradients and the optimizer's state; placement and bytes.

                      on the device                      with optim.offload in host memory
    compute copies    whole                              shard, on its way to the device
    masters, moments  shard                              shard
    gradients         whole; where a step is one group   the same; on the device two buffers of a
                      of micro-batches shard, and two    layer, to which backward adds
                      buffers of a layer

The shard is everything, or with ``optim.shard`` one of world_size equal parts.
"""

import torch
from torch import Tensor

from fttrain.memory.parts import MemoryPart
from fttrain.model.decoder import Decoder
from fttrain.model.layer_adapters import HostShard, LayerAdapters, copy_dtype
from fttrain.optim.flat import FlatLayout, Shard
from fttrain.optim.optimizer import moment_bytes
from fttrain.strategy.context import BuildContext
from fttrain.strategy.grad_reduce import GradientSync
from fttrain.strategy.gradients import (
    BUFFERS,
    DoubleBufferedGradients,
    GradientBuffers,
    ResidentGradients,
)

FP32_BYTES = 4


def reserve_trainable(context: BuildContext, layers: int) -> None:
    """Reserve the trainable state of so many ``layers``."""
    ledger, optim, layout = context.ledger, context.spec.optim, layout_of(context)
    ledger.reserve(MemoryPart.ADAPTERS, adapter_bytes(context) * layers)
    if _double_buffered(context):
        ledger.reserve(MemoryPart.GRADIENT_BUFFERS, BUFFERS * FP32_BYTES * layout.values)
    if optim.offload:
        ledger.reserve(MemoryPart.ADAPTER_MASTERS, FP32_BYTES * layout.shard_values * layers)
        ledger.reserve(
            MemoryPart.ADAPTER_GRADIENTS, FP32_BYTES * _gradient_values(context) * layers
        )
        ledger.reserve(
            MemoryPart.ADAPTER_COPIES, _copy_dtype(context).itemsize * layout.shard_values * layers
        )
        ledger.reserve(
            MemoryPart.OPTIMIZER_MOMENTS, moment_bytes(optim, layout.shard_values) * layers
        )


def adapter_bytes(context: BuildContext) -> int:
    """Bytes of one layer's adapters on the device during the whole run."""
    layout, optim = layout_of(context), context.spec.optim
    copies = _copy_dtype(context).itemsize * layout.values
    if "m" in layout.names:  # DoRA: fp32 squares of the frozen rows' norms n, and m / n
        copies += 2 * FP32_BYTES * layout.section_values("m")
    if optim.offload:
        return copies
    masters = FP32_BYTES * layout.shard_values
    return (
        copies
        + masters
        + moment_bytes(optim, layout.shard_values)
        + FP32_BYTES * _gradient_values(context)
    )


def _copy_dtype(context: BuildContext) -> torch.dtype:
    return copy_dtype(context.spec.lora, context.dtype)


def optimizer_shard(context: BuildContext) -> Shard:
    """The shard of each layer's adapters that this rank updates."""
    group = context.group
    return Shard(group.rank, group.world_size) if context.spec.optim.shard else Shard()


def layout_of(context: BuildContext) -> FlatLayout:
    """The flat layout of a layer's adapters, the same for all layers."""
    meta = torch.device("meta")  # shapes without memory
    groups, lora = context.architecture.groups, context.spec.lora
    return LayerAdapters(
        0, groups, lora, meta, context.dtype, shard=optimizer_shard(context)
    ).layout


def adapters(context: BuildContext, layers: range) -> list[LayerAdapters]:
    """The adapters of each of ``layers``, at their initial values."""
    groups, spec, device = context.architecture.groups, context.spec, context.group.device
    on_host = _on_host(context, len(layers)) if spec.optim.offload else [None] * len(layers)
    built = [
        LayerAdapters(
            layer, groups, spec.lora, device, context.dtype, memory, optimizer_shard(context)
        )
        for layer, memory in zip(layers, on_host, strict=True)
    ]
    for layer_adapters in built:
        layer_adapters.reset(spec.seed)
    return built


def _on_host(context: BuildContext, layers: int) -> list[HostShard]:
    """The host memory of each layer's masters and outgoing copies."""
    masters = _by_layer(context.ledger.allocate(MemoryPart.ADAPTER_MASTERS), torch.float32, layers)
    copies = _by_layer(
        context.ledger.allocate(MemoryPart.ADAPTER_COPIES), _copy_dtype(context), layers
    )
    return [HostShard(*memory) for memory in zip(masters, copies, strict=True)]


def gradients(context: BuildContext, decoder: Decoder, sync: GradientSync) -> GradientBuffers:
    """The buffers of the adapters' gradients."""
    adapters, device = [layer.adapters for layer in decoder.layers], context.group.device
    if not _double_buffered(context):
        return ResidentGradients(adapters, sync)
    if context.spec.optim.offload:
        storage = _by_layer(
            context.ledger.allocate(MemoryPart.ADAPTER_GRADIENTS), torch.float32, len(adapters)
        )
    else:
        shape = len(adapters), _gradient_values(context)
        storage = list(torch.zeros(shape, device=device).unbind(0))
    return DoubleBufferedGradients(adapters, sync, device, storage)


def _double_buffered(context: BuildContext) -> bool:
    """Whether the device holds no more than ``BUFFERS`` whole gradients."""
    return context.spec.optim.offload or (
        optimizer_shard(context).world_size > 1 and _one_group(context)
    )


def _gradient_values(context: BuildContext) -> int:
    """fp32 values stored of one layer's gradient: this rank's shard, or all of them where several
    groups of micro-batches add to the gradient before its reduction.
    """
    layout = layout_of(context)
    return layout.shard_values if _one_group(context) else layout.values


def _one_group(context: BuildContext) -> bool:
    """Whether a step is one group of micro-batches: a layer's gradient is complete as its first
    backward ends, also after ``Strategy.resize``.
    """
    return (context.spec.schedule.kind, context.spec.schedule.micro_batch_group) == (
        "grouped",
        "all",
    )


def _by_layer(buffer: Tensor, dtype: torch.dtype, layers: int) -> list[Tensor]:
    """uint8 host memory -> ``dtype`` (values,) of each layer."""
    return list(buffer.view(dtype).view(layers, -1).unbind(0))
