"""stream: HostStore x grouped(G) x all_reduce. Some layers on the device, the rest in one host copy
of the machine; no rank needs another one for them, and one rank is enough.
"""

from fttrain.memory.parts import MemoryPart
from fttrain.store import FrozenBase
from fttrain.store.host import HostStore, resident_set
from fttrain.store.loading import Progress, reserve_layers, to_device
from fttrain.strategy.data_parallel import DataParallel, build_data_parallel, reserve_data_parallel
from fttrain.strategy.model_slice import ModelSlice
from fttrain.strategy.spec import BuildContext


def reserve(context: BuildContext) -> ModelSlice:
    """Host memory that it needs. Raises UserError for resident layers that there are not."""
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
    machine, layer_bytes = context.group.intra_node, context.layer_bytes
    on_host = _on_host(context)
    shared = {}
    if on_host:
        buffer = context.ledger.allocate(MemoryPart.HOST_LAYERS).view(-1, layer_bytes)
        shared = dict(zip(on_host, buffer.unbind(0), strict=True))
    own = on_host[machine.rank :: machine.world_size]
    resident = sorted(_resident(context, machine.rank))
    total = len(own) + len(resident)
    for done, layer in enumerate(own, start=1):
        base.read(layer, shared[layer])
        progress(done, total)
    flats = to_device(
        base,
        resident,
        layer_bytes,
        context.ledger,
        lambda done, _: progress(len(own) + done, total),
    )
    machine.barrier()  # the others' layers are there as well
    store = HostStore(
        len(base),
        dict(zip(resident, flats, strict=True)),
        shared,
        context.frozen_format,
        machine.device,
        context.spec.strategy.slots,
    )
    return build_data_parallel(context, base, model_slice, store)


def _resident(context: BuildContext, rank: int) -> frozenset[int]:
    """Layers that stay on the device of ``rank`` of the machine."""
    layers, world_size = context.architecture.layers, context.group.intra_node.world_size
    return resident_set(layers, context.spec.strategy.resident(rank, world_size, layers))


def _on_host(context: BuildContext) -> list[int]:
    """Layers of the machine's host copy: those that any rank does not keep."""
    everywhere = frozenset.intersection(
        *(_resident(context, rank) for rank in range(context.group.intra_node.world_size))
    )
    return [layer for layer in range(context.architecture.layers) if layer not in everywhere]
