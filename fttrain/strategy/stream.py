"""stream: HostStore x grouped(G) x all_reduce. Some layers on the device, the rest in one host copy
of the node. Layers do not travel between ranks, and one rank is enough.
"""

from fttrain.memory.parts import MemoryPart
from fttrain.store import FrozenBase
from fttrain.store.host import HostStore, resident_set
from fttrain.store.loading import Progress, reserve_layers, to_device
from fttrain.strategy.context import BuildContext
from fttrain.strategy.data_parallel import DataParallel, build_data_parallel, reserve_data_parallel
from fttrain.strategy.model_slice import ModelSlice


def reserve(context: BuildContext) -> ModelSlice:
    """Reserve the memory of device and host. Raises UserError for more resident layers than the
    model has.
    """
    model_slice = reserve_data_parallel(context)
    on_host = _on_host(context)
    if on_host:
        context.ledger.reserve(MemoryPart.HOST_LAYERS, len(on_host) * context.layer_bytes)
    reserve_layers(
        context.ledger, len(_resident(context, context.group.intra_node.rank)), context.layer_bytes
    )
    if on_host:
        context.ledger.reserve(MemoryPart.SLOTS, context.spec.strategy.slots * context.layer_bytes)
    return model_slice


def build(
    context: BuildContext, base: FrozenBase, model_slice: ModelSlice, progress: Progress
) -> DataParallel:
    """Fill the host copy together, load this rank's resident layers and join the parts."""
    node, layer_bytes = context.group.intra_node, context.layer_bytes
    on_host = _on_host(context)
    shared = {}
    if on_host:
        buffer = context.ledger.allocate(MemoryPart.HOST_LAYERS).view(-1, layer_bytes)
        shared = dict(zip(on_host, buffer.unbind(0), strict=True))
    local_layers = on_host[node.rank :: node.world_size]  # that this rank reads for the node
    resident = sorted(_resident(context, node.rank))
    total = len(local_layers) + len(resident)
    for done, layer in enumerate(local_layers, start=1):
        base.read(layer, shared[layer])
        progress(done, total)
    flats = to_device(
        base,
        resident,
        layer_bytes,
        context.ledger,
        lambda done, _: progress(len(local_layers) + done, total),
    )
    node.barrier()  # after it, all layers are in the host copy
    store = HostStore(
        len(base),
        dict(zip(resident, flats, strict=True)),
        shared,
        context.frozen_format,
        node.device,
        context.spec.strategy.slots,
    )
    return build_data_parallel(context, base, model_slice, store)


def _resident(context: BuildContext, rank: int) -> frozenset[int]:
    """Layers that stay on the device of ``rank`` of the node."""
    layers, world_size = context.architecture.layers, context.group.intra_node.world_size
    return resident_set(layers, context.spec.strategy.resident(rank, world_size, layers))


def _on_host(context: BuildContext) -> list[int]:
    """Layers of the node's host copy: all but those that are resident on every rank."""
    everywhere = frozenset.intersection(
        *(_resident(context, rank) for rank in range(context.group.intra_node.world_size))
    )
    return [layer for layer in range(context.architecture.layers) if layer not in everywhere]
