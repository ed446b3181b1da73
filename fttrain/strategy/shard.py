"""shard: ShardedStore x grouped(G) x all_reduce. Each rank of a node keeps a shard of every layer;
the other shards are gathered while the previous layer computes.
"""

from fttrain.memory.parts import MemoryPart
from fttrain.store import FrozenBase
from fttrain.store.loading import Progress, reserve_layers, to_device
from fttrain.store.sharded import SLOTS, ShardedStore, shard_bytes
from fttrain.strategy.context import BuildContext
from fttrain.strategy.data_parallel import DataParallel, build_data_parallel, reserve_data_parallel
from fttrain.strategy.model_slice import ModelSlice


def reserve(context: BuildContext) -> ModelSlice:
    """Reserve the memory of device and host. Raises UserError for a number of ranks that does not
    divide a layer.
    """
    local_bytes = shard_bytes(context.layer_bytes, context.group.intra_node.world_size)
    model_slice = reserve_data_parallel(context)
    reserve_layers(context.ledger, context.architecture.layers, local_bytes)
    context.ledger.reserve(MemoryPart.SLOTS, SLOTS * context.layer_bytes)
    return model_slice


def build(
    context: BuildContext, base: FrozenBase, model_slice: ModelSlice, progress: Progress
) -> DataParallel:
    """Load this rank's shard of each layer and join the parts."""
    group = context.group.intra_node
    local_bytes = shard_bytes(context.layer_bytes, group.world_size)
    shards = to_device(
        base, range(len(base)), local_bytes, context.ledger, progress, group.rank * local_bytes
    )
    store = ShardedStore(shards, context.frozen_format, group)
    return build_data_parallel(context, base, model_slice, store)
