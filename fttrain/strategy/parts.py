"""The parts that strategies share: where ends, adapters, gradients and boundaries are put.

First ``book`` says what they need in host memory; once all has been compared with what the machine
has, the frozen base is opened and the parts are made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.data.batch import ROW_MULTIPLE
from fttrain.model.decoder import Decoder
from fttrain.model.lora import LayerAdapters
from fttrain.schedule.layer_pass import Saving
from fttrain.store import FrozenBase, Store
from fttrain.store.boundary import HostBoundaries, boundary_bytes
from fttrain.store.verify import VerifiedStore
from fttrain.strategy.gradients import DeviceGradients, GradientHome, HostGradients
from fttrain.strategy.recipe import Plan
from fttrain.strategy.sync import GradientSync
from fttrain.units import round_up

# What the host pool knows the buffers by.
SLOTS, BOUNDARIES, ADAPTERS = "layers in use", "boundaries", "adapters"
LOADING = "a table being loaded"
EMBEDDING, HEAD = "embedding", "head"
MASTERS, MOMENTS, GRADIENTS = "adapter masters", "optimizer moments", "adapter gradients"


@dataclass(frozen=True)
class Share:
    """This rank's part of the model."""

    layers: range
    has_embedding: bool = True
    has_head: bool = True


def book(plan: Plan, share: Share, micro_batches: int) -> None:
    """Host memory of what every strategy has. ``micro_batches``: kept for backward at once."""
    pool, placement = plan.pool, plan.recipe.placement
    on_cpu = plan.group.device.type == "cpu"
    if placement.boundaries == "host":
        shape = _boundary_shape(plan, share, micro_batches)
        pool.book(BOUNDARIES, boundary_bytes(shape, plan.dtype))
    elif on_cpu:
        pool.book(BOUNDARIES, micro_batches * len(share.layers) * saved_bytes(plan))
    if placement.embedding == "host":
        pool.book(EMBEDDING, plan.table_bytes, shared=True)
    elif on_cpu and share.has_embedding:
        pool.book(EMBEDDING, plan.table_bytes)
    # Where they are tied and in one place the head is the embedding's table.
    alike = (placement.embedding == "host") == (placement.head == "streamed")
    is_embedding = plan.architecture.tied and alike
    if placement.head == "streamed" and not is_embedding:
        pool.book(HEAD, plan.table_bytes, shared=True)
    elif on_cpu and share.has_head and not (is_embedding and share.has_embedding):
        pool.book(HEAD, plan.table_bytes)
    if on_cpu:
        pool.book(ADAPTERS, adapter_bytes(plan) * len(share.layers))
    elif placement.embedding == "device" or placement.head == "resident":
        pool.book(LOADING, plan.table_bytes)
    if plan.recipe.optim.offload:
        values = adapter_values(plan)
        for what, copies in ((MASTERS, 1), (GRADIENTS, 1), (MOMENTS, 2)):
            pool.book(what, 4 * copies * values * len(share.layers))


def adapter_values(plan: Plan) -> int:
    """Trained values of one layer."""
    return _meta_adapters(plan).flat.numel()


def adapter_bytes(plan: Plan) -> int:
    """What one layer's adapters take on the device: compute copies, and unless they are offloaded
    fp32 master, gradient and two moments.
    """
    copies = sum(a.a.numel() + a.b.numel() for a in _meta_adapters(plan).groups.values())
    trained = 0 if plan.recipe.optim.offload else 16 * adapter_values(plan)
    return copies * plan.dtype.itemsize + trained


def saved_bytes(plan: Plan) -> int:
    """What one layer keeps on the device for one micro-batch's backward."""
    a, placement = plan.architecture, plan.recipe.placement
    width = 0 if placement.boundaries == "host" else a.hidden
    if placement.activations == "keep":  # q, k, v; attention's output; second residual; gate, up
        width += (2 * a.heads + 2 * a.kv_heads) * a.head_dim + a.hidden
        width += 2 * a.config.intermediate_size
    rows = round_up(plan.recipe.size.micro_batch_tokens, ROW_MULTIPLE)
    return rows * width * plan.dtype.itemsize


def _meta_adapters(plan: Plan) -> LayerAdapters:
    """A layer's adapters as shapes, without memory."""
    meta = torch.device("meta")
    return LayerAdapters(0, plan.architecture.groups, plan.recipe.lora, meta, plan.dtype)


def saving(plan: Plan, share: Share, micro_batches: int) -> Saving:
    """What layers leave for backward, and where."""
    placement = plan.recipe.placement
    if placement.boundaries == "device":
        return Saving(placement.activations)
    shape = _boundary_shape(plan, share, micro_batches)
    buffer = plan.pool.allocate(BOUNDARIES)
    return Saving("recompute", HostBoundaries(buffer, shape, plan.dtype, plan.group.device))


def _boundary_shape(plan: Plan, share: Share, micro_batches: int) -> tuple[int, int, int]:
    rows = round_up(plan.recipe.size.micro_batch_tokens, ROW_MULTIPLE)
    return micro_batches * len(share.layers), rows, plan.architecture.hidden


def decoder(plan: Plan, base: FrozenBase, share: Share) -> Decoder:
    """This rank's layers, and its ends where the placement says; adapters at their start."""
    placement = plan.recipe.placement
    embedding = head = None
    if share.has_embedding or placement.embedding == "host":  # reading a shared one takes all
        embedding = _table(plan, base, EMBEDDING, on_host=placement.embedding == "host")
    if share.has_head or placement.head == "streamed":
        # A shared table is made by all ranks together: each must come to the same answer.
        tied_here = base.tied and embedding is not None
        alike = (placement.embedding == "host") == (placement.head == "streamed")
        streamed = placement.head == "streamed"
        head = embedding if tied_here and alike else _table(plan, base, HEAD, on_host=streamed)
    norm = torch.empty(plan.architecture.hidden, dtype=plan.dtype)
    base.read_end("final_norm", norm)
    masters = None
    if plan.recipe.optim.offload:
        masters = _by_layer(plan.pool.allocate(MASTERS), len(share.layers))
    built = Decoder(
        plan.architecture,
        embedding if share.has_embedding else None,
        norm.to(plan.group.device),
        head if share.has_head else None,
        plan.recipe.lora,
        layers=share.layers,
        head_streamed=placement.head == "streamed",
        masters=masters,
    )
    for layer in built.layers:
        layer.adapters.reset(plan.recipe.seed)
    return built


def _table(plan: Plan, base: FrozenBase, name: str, on_host: bool) -> Tensor:
    """Embedding or head (V, C): on the device, or in the machine's one host copy, which rank 0
    fills.
    """
    shape = (plan.architecture.config.vocab_size, plan.architecture.hidden)
    if not on_host:
        if plan.group.device.type == "cpu":
            table = torch.empty(shape, dtype=plan.dtype)
        else:
            table = plan.pool.allocate(LOADING).view(plan.dtype).view(shape)
        base.read_end(name, table)
        return table.to(plan.group.device)
    table = plan.pool.allocate(name).view(plan.dtype).view(shape)
    if plan.group.is_main:
        base.read_end(name, table)
    plan.group.barrier()
    return table


def gradients(plan: Plan, built: Decoder, sync: GradientSync) -> GradientHome:
    """Where the adapters' gradients live."""
    adapters = [layer.adapters for layer in built.layers]
    if not plan.recipe.optim.offload:
        return DeviceGradients(adapters, sync)
    on_host = _by_layer(plan.pool.allocate(GRADIENTS), len(adapters))
    return HostGradients(adapters, sync, plan.group.device, on_host)


def verified(plan: Plan, base: FrozenBase, store: Store, layers: Sequence[int]) -> VerifiedStore:
    """``store`` of ``layers``, checked against the cache's manifest."""
    expected = [base.checksum(layer) for layer in layers]
    return VerifiedStore(store, expected, plan.recipe.frozen.verify_every)


def files(base: FrozenBase) -> list[str]:
    """Where each layer lies on disk."""
    return [str(base.path(layer)) for layer in range(len(base))]


def _by_layer(buffer: Tensor, layers: int) -> list[Tensor]:
    """uint8 host memory -> fp32 (values,) for each layer."""
    return list(buffer.view(torch.float32).view(layers, -1).unbind(0))
