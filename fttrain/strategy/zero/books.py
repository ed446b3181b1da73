"""What a rank under ZeRO takes of its device and of the host, part by part."""

from fttrain.model.head import chunk_bytes, chunk_rows
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.store.filling import LAYERS
from fttrain.strategy import ends, parts
from fttrain.strategy.recipe import Plan
from fttrain.strategy.zero.settings import Settings

TRAINED, GRADIENTS, MASTERS = "what trains", "its gradients", "masters and moments"


def book(plan: Plan, settings: Settings) -> None:
    """What is certain; gathered layers and DeepSpeed's buckets come on top."""
    a, recipe, pool = plan.architecture, plan.recipe, plan.pool
    values = trained_values(plan)
    parts_of = plan.group.world_size if settings.stage == 3 else 1
    put = pool.book if settings.offload_params else pool.book_device
    tables_bytes = plan.table_bytes * (1 if a.tied else 2)
    put(LAYERS, a.layers * plan.layer_bytes // parts_of)
    put(ends.EMBEDDING, tables_bytes // parts_of)
    if recipe.lora.r:
        put(TRAINED, values * plan.dtype.itemsize // parts_of)
    held = 1 if settings.stage == 1 else plan.group.world_size
    pool.book_device(GRADIENTS, 4 * values // held)
    own = pool.book if settings.offload_optimizer else pool.book_device
    own(MASTERS, 12 * values // plan.group.world_size)
    saved = parts.saved_bytes(plan, recipe.placement.activations)  # type: ignore[arg-type]
    pool.book_device(parts.SAVED, a.layers * saved)
    rows = chunk_rows(a.config.vocab_size, plan.dtype, recipe.size.micro_batch_tokens)
    pool.book_device(ends.LOGITS, chunk_bytes(a.config.vocab_size, plan.dtype, rows))


def trained_values(plan: Plan) -> int:
    """Numbers that train, of the whole model."""
    a, lora = plan.architecture, plan.recipe.lora
    if lora.r:
        meta = LayerAdapters(0, a.groups, lora, plan.group.device, plan.dtype)
        return a.layers * meta.layout.values
    of_layers = a.layers * plan.layer_bytes // plan.dtype.itemsize
    tables = (1 if a.tied else 2) * plan.table_bytes // plan.dtype.itemsize
    return of_layers + tables + a.hidden
