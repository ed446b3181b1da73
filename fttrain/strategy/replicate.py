"""replicate: ResidentStore x grouped(G) x all_reduce. Only gradients travel between ranks."""

from fttrain.store import FrozenBase
from fttrain.store.filling import Progress, in_turn, reserve_layers, to_device
from fttrain.store.resident import ResidentStore
from fttrain.strategy.data_parallel import DataParallel, assemble_data_parallel, book_data_parallel
from fttrain.strategy.parts import Share
from fttrain.strategy.recipe import Plan


def book(plan: Plan) -> Share:
    """Host memory that it needs."""
    share = book_data_parallel(plan)
    reserve_layers(plan.pool, plan.architecture.layers, plan.layer_bytes)
    return share


def build(plan: Plan, base: FrozenBase, share: Share, progress: Progress) -> DataParallel:
    """Load all layers onto the device and join the parts."""
    machine = plan.group.intra_node  # whose ranks read the same files
    order = in_turn(share.layers, machine.rank, machine.world_size)
    flats = dict(
        zip(order, to_device(base, order, plan.layer_bytes, plan.pool, progress), strict=True)
    )
    store = ResidentStore([flats[layer] for layer in share.layers], plan.frozen_format)
    return assemble_data_parallel(plan, base, share, store)
