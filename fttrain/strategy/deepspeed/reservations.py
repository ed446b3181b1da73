"""Reservations of a rank under ZeRO, on its device and on the host."""

from fttrain.memory.parts import MemoryPart
from fttrain.model.head import chunk_bytes, chunk_rows
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.strategy.context import BuildContext
from fttrain.strategy.deepspeed.settings import Settings
from fttrain.strategy.model_slice import saved_bytes


def reserve(context: BuildContext, settings: Settings) -> None:
    """Reserve all but gathered layers and DeepSpeed's buckets, whose bytes are not known ahead."""
    a, spec, ledger = context.architecture, context.spec, context.ledger
    values = trained_values(context)
    partitions = context.group.world_size if settings.stage == 3 else 1
    tables_bytes = context.table_bytes * (1 if a.tied else 2)
    layers_part, tables_part, trained_part = _weight_parts(settings)
    ledger.reserve(layers_part, a.layers * context.layer_bytes // partitions)
    ledger.reserve(tables_part, tables_bytes // partitions)
    if spec.lora.r:
        ledger.reserve(trained_part, values * context.dtype.itemsize // partitions)
    gradient_partitions = 1 if settings.stage == 1 else context.group.world_size
    ledger.reserve(MemoryPart.GRADIENTS, 4 * values // gradient_partitions)  # fp32
    offloaded = settings.offload_optimizer
    state = MemoryPart.HOST_OPTIMIZER_STATE if offloaded else MemoryPart.OPTIMIZER_STATE
    # fp32 master and two moments
    ledger.reserve(state, 12 * values // context.group.world_size)
    saved = saved_bytes(context, spec.placement.activations)  # type: ignore[arg-type]
    ledger.reserve(MemoryPart.ACTIVATIONS, a.layers * saved)
    rows = chunk_rows(a.config.vocab_size, context.dtype, spec.size.micro_batch_tokens)
    ledger.reserve(MemoryPart.LOGITS, chunk_bytes(a.config.vocab_size, context.dtype, rows))


def _weight_parts(settings: Settings) -> tuple[MemoryPart, MemoryPart, MemoryPart]:
    """The ledger's parts of layers, of embedding and head, and of trained weights."""
    if settings.offload_params:
        return (
            MemoryPart.HOST_LAYER_PARTITION,
            MemoryPart.HOST_TABLE_PARTITION,
            MemoryPart.HOST_TRAINED_PARTITION,
        )
    return MemoryPart.FROZEN_LAYERS, MemoryPart.EMBEDDING, MemoryPart.TRAINED_WEIGHTS


def trained_values(context: BuildContext) -> int:
    """The number of trained values of the whole model."""
    a, lora = context.architecture, context.spec.lora
    if lora.r:
        meta = LayerAdapters(0, a.groups, lora, context.group.device, context.dtype)
        return a.layers * meta.layout.values
    layer_values = a.layers * context.layer_bytes // context.dtype.itemsize
    table_values = (1 if a.tied else 2) * context.table_bytes // context.dtype.itemsize
    return layer_values + table_values + a.hidden
