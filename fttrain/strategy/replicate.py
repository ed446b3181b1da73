"""replicate: ResidentStore x grouped(G) x all_reduce. Only gradients travel between ranks."""

from fttrain.store import FrozenBase
from fttrain.store.loading import Progress, in_turn, reserve_layers, to_device
from fttrain.store.resident import ResidentStore
from fttrain.strategy.context import BuildContext
from fttrain.strategy.data_parallel import DataParallel, build_data_parallel, reserve_data_parallel
from fttrain.strategy.model_slice import ModelSlice


def reserve(context: BuildContext) -> ModelSlice:
    """Reserve the memory of device and host."""
    model_slice = reserve_data_parallel(context)
    reserve_layers(context.ledger, context.architecture.layers, context.layer_bytes)
    return model_slice


def build(
    context: BuildContext, base: FrozenBase, model_slice: ModelSlice, progress: Progress
) -> DataParallel:
    """Load all layers onto the device and join the parts."""
    node = context.group.intra_node  # whose ranks read the same files
    order = in_turn(model_slice.layers, node.rank, node.world_size)
    flats = dict(
        zip(
            order,
            to_device(base, order, context.layer_bytes, context.ledger, progress),
            strict=True,
        )
    )
    store = ResidentStore([flats[layer] for layer in model_slice.layers], context.frozen_format)
    return build_data_parallel(context, base, model_slice, store)
