"""stream: HostStore x grouped(G) x all_reduce. Some layers on the device, the rest in one host copy
of the machine; no rank needs another one for them, and one rank is enough.
"""

from fttrain.memory.parts import MemoryPart
from fttrain.store import FrozenBase
from fttrain.store.filling import Progress, reserve_layers, to_device
from fttrain.store.host import HostStore, resident_set
from fttrain.strategy.data_parallel import DataParallel, assemble_data_parallel, book_data_parallel
from fttrain.strategy.parts import Share
from fttrain.strategy.recipe import Plan


def book(plan: Plan) -> Share:
    """Host memory that it needs. Raises UserError for resident layers that there are not."""
    share = book_data_parallel(plan)
    on_host = _on_host(plan)
    if on_host:
        plan.pool.reserve(MemoryPart.HOST_LAYERS, len(on_host) * plan.layer_bytes)
    reserve_layers(plan.pool, len(_resident(plan, plan.group.intra_node.rank)), plan.layer_bytes)
    if on_host:
        plan.pool.reserve(MemoryPart.SLOTS, plan.recipe.strategy.slots * plan.layer_bytes)
    return share


def build(plan: Plan, base: FrozenBase, share: Share, progress: Progress) -> DataParallel:
    """Fill the host copy together, load this rank's resident layers and join the parts."""
    machine, layer_bytes = plan.group.intra_node, plan.layer_bytes
    on_host = _on_host(plan)
    shared = {}
    if on_host:
        buffer = plan.pool.allocate(MemoryPart.HOST_LAYERS).view(-1, layer_bytes)
        shared = dict(zip(on_host, buffer.unbind(0), strict=True))
    own = on_host[machine.rank :: machine.world_size]
    resident = sorted(_resident(plan, machine.rank))
    total = len(own) + len(resident)
    for done, layer in enumerate(own, start=1):
        base.read(layer, shared[layer])
        progress(done, total)
    flats = to_device(
        base, resident, layer_bytes, plan.pool, lambda done, _: progress(len(own) + done, total)
    )
    machine.barrier()  # the others' layers are there as well
    store = HostStore(
        len(base),
        dict(zip(resident, flats, strict=True)),
        shared,
        plan.frozen_format,
        machine.device,
        plan.recipe.strategy.slots,
    )
    return assemble_data_parallel(plan, base, share, store)


def _resident(plan: Plan, rank: int) -> frozenset[int]:
    """Layers that stay on the device of ``rank`` of the machine."""
    layers, world_size = plan.architecture.layers, plan.group.intra_node.world_size
    return resident_set(layers, plan.recipe.strategy.resident(rank, world_size, layers))


def _on_host(plan: Plan) -> list[int]:
    """Layers of the machine's host copy: those that any rank does not keep."""
    everywhere = frozenset.intersection(
        *(_resident(plan, rank) for rank in range(plan.group.intra_node.world_size))
    )
    return [layer for layer in range(plan.architecture.layers) if layer not in everywhere]
