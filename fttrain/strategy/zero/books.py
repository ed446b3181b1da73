"""What a rank under ZeRO takes of its device and of the host, part by part."""

from fttrain.memory.parts import MemoryPart
from fttrain.model.head import chunk_bytes, chunk_rows
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.strategy import parts
from fttrain.strategy.recipe import Plan
from fttrain.strategy.zero.settings import Settings


def book(plan: Plan, settings: Settings) -> None:
    """What is certain; gathered layers and DeepSpeed's buckets come on top."""
    a, recipe, ledger = plan.architecture, plan.recipe, plan.pool
    values = trained_values(plan)
    partitions = plan.group.world_size if settings.stage == 3 else 1
    tables_bytes = plan.table_bytes * (1 if a.tied else 2)
    layers_part, tables_part, trained_part = _weight_parts(settings)
    ledger.reserve(layers_part, a.layers * plan.layer_bytes // partitions)
    ledger.reserve(tables_part, tables_bytes // partitions)
    if recipe.lora.r:
        ledger.reserve(trained_part, values * plan.dtype.itemsize // partitions)
    held = 1 if settings.stage == 1 else plan.group.world_size
    ledger.reserve(MemoryPart.GRADIENTS, 4 * values // held)
    offloaded = settings.offload_optimizer
    state = MemoryPart.HOST_OPTIMIZER_STATE if offloaded else MemoryPart.OPTIMIZER_STATE
    ledger.reserve(state, 12 * values // plan.group.world_size)
    saved = parts.saved_bytes(plan, recipe.placement.activations)  # type: ignore[arg-type]
    ledger.reserve(MemoryPart.ACTIVATIONS, a.layers * saved)
    rows = chunk_rows(a.config.vocab_size, plan.dtype, recipe.size.micro_batch_tokens)
    ledger.reserve(MemoryPart.LOGITS, chunk_bytes(a.config.vocab_size, plan.dtype, rows))


def _weight_parts(settings: Settings) -> tuple[MemoryPart, MemoryPart, MemoryPart]:
    """The parts of layers, of embedding and head, and of trained weights."""
    if settings.offload_params:
        return (
            MemoryPart.HOST_LAYER_PARTITION,
            MemoryPart.HOST_TABLE_PARTITION,
            MemoryPart.HOST_TRAINED_PARTITION,
        )
    return MemoryPart.FROZEN_LAYERS, MemoryPart.EMBEDDING, MemoryPart.TRAINED_WEIGHTS


def trained_values(plan: Plan) -> int:
    """Numbers that train, of the whole model."""
    a, lora = plan.architecture, plan.recipe.lora
    if lora.r:
        meta = LayerAdapters(0, a.groups, lora, plan.group.device, plan.dtype)
        return a.layers * meta.layout.values
    of_layers = a.layers * plan.layer_bytes // plan.dtype.itemsize
    tables = (1 if a.tied else 2) * plan.table_bytes // plan.dtype.itemsize
    return of_layers + tables + a.hidden
