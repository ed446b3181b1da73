"""shard: ShardedStore x grouped(G) x all_reduce. Each rank of a machine keeps a part of every
layer; the others' parts arrive while the layer before computes.
"""

from fttrain.memory.parts import MemoryPart
from fttrain.store import FrozenBase
from fttrain.store.filling import Progress, reserve_layers, to_device
from fttrain.store.sharded import SLOTS, ShardedStore, shard_bytes
from fttrain.strategy.data_parallel import DataParallel, assemble_data_parallel, book_data_parallel
from fttrain.strategy.parts import Share
from fttrain.strategy.recipe import Plan


def book(plan: Plan) -> Share:
    """Host memory that it needs. Raises UserError for ranks that a layer does not divide among."""
    own_bytes = shard_bytes(plan.layer_bytes, plan.group.intra_node.world_size)
    share = book_data_parallel(plan)
    reserve_layers(plan.pool, plan.architecture.layers, own_bytes)
    plan.pool.reserve(MemoryPart.SLOTS, SLOTS * plan.layer_bytes)
    return share


def build(plan: Plan, base: FrozenBase, share: Share, progress: Progress) -> DataParallel:
    """Load this rank's part of each layer and join the parts."""
    group = plan.group.intra_node
    own_bytes = shard_bytes(plan.layer_bytes, group.world_size)
    shards = to_device(
        base, range(len(base)), own_bytes, plan.pool, progress, group.rank * own_bytes
    )
    store = ShardedStore(shards, plan.frozen_format, group)
    return assemble_data_parallel(plan, base, share, store)
