"""The parts that strategies share: where ends, adapters, gradients and boundaries are put.

First ``book`` says what they need of device and host; once all has been compared with what there
is, the frozen base is opened and the parts are made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.data.batch import ROW_MULTIPLE
from fttrain.model.decoder import Decoder
from fttrain.model.head import chunk_bytes
from fttrain.model.lora import LayerAdapters, OnHost
from fttrain.optim.optimizer import moment_bytes
from fttrain.schedule.activations import Keep, Offload, Policies, Policy, Recompute
from fttrain.store import FrozenBase, Store
from fttrain.store.activations import ALIGN_BYTES, UNDER_WAY, HostActivations
from fttrain.store.boundary import Boundaries, DeviceBoundaries, HostBoundaries, boundary_bytes
from fttrain.store.verify import VerifiedStore
from fttrain.strategy.gradients import BUFFERS, DeviceGradients, GradientHome, HostGradients
from fttrain.strategy.recipe import Plan
from fttrain.strategy.sync import GradientSync
from fttrain.units import round_up

# What the books call each part.
SLOTS, WEIGHTS = "layers in use", "dequantised weights"
ADAPTERS, OPEN_GRADIENTS = "adapters", "gradients in use"
EMBEDDING, HEAD, LOGITS = "embedding", "head", "logits"
SAVED, MOVING = "activations", "activations on their way"
BOUNDARIES, ACTIVATIONS = "boundaries", "activations on the host"
LOADING = "a table being loaded"
MASTERS, COPIES = "adapter masters", "adapters on their way to the device"
MOMENTS, GRADIENTS = "optimizer moments", "adapter gradients"


@dataclass(frozen=True)
class Share:
    """This rank's part of the model."""

    layers: range
    has_embedding: bool = True
    has_head: bool = True


def book(plan: Plan, share: Share, micro_batches: int) -> None:
    """Memory of what every strategy has. ``micro_batches``: kept for backward at once."""
    _book_saved(plan, share, micro_batches)
    _book_ends(plan, share)
    layers, pool = len(share.layers), plan.pool
    pool.book_device(ADAPTERS, adapter_bytes(plan) * layers)
    pool.book_device(WEIGHTS, dequantised_bytes(plan))
    if plan.recipe.optim.offload:
        values = adapter_values(plan)
        pool.book_device(OPEN_GRADIENTS, BUFFERS * 4 * values)
        pool.book(MASTERS, 4 * values * layers)
        pool.book(GRADIENTS, 4 * values * layers)
        pool.book(COPIES, plan.dtype.itemsize * values * layers)
        pool.book(MOMENTS, moment_bytes(plan.recipe.optim, values) * layers)


def _book_saved(plan: Plan, share: Share, micro_batches: int) -> None:
    """What layers leave for backward."""
    pool, used = plan.pool, own_policies(plan, share)
    pool.book_device(SAVED, micro_batches * sum(saved_bytes(plan, policy) for policy in used))
    pool.book_device(MOVING, moving_bytes(plan))
    if "offload" in used:
        pool.book(ACTIVATIONS, micro_batches * used.count("offload") * activation_bytes(plan))
    if "recompute" in used and plan.recipe.placement.boundaries == "host":
        shape = _boundary_shape(plan, share, micro_batches)
        pool.book(BOUNDARIES, boundary_bytes(shape, plan.dtype))


def _book_ends(plan: Plan, share: Share) -> None:
    """Embedding and head; tied and in one place, the head is the embedding's table."""
    pool, placement = plan.pool, plan.recipe.placement
    if placement.embedding == "host":
        pool.book(EMBEDDING, plan.table_bytes, shared=True)
    elif share.has_embedding:
        pool.book_device(EMBEDDING, plan.table_bytes)
    alike = (placement.embedding == "host") == (placement.head == "streamed")
    is_embedding = plan.architecture.tied and alike
    if placement.head == "streamed" and not is_embedding:
        pool.book(HEAD, plan.table_bytes, shared=True)
    elif share.has_head and not (is_embedding and share.has_embedding):
        pool.book_device(HEAD, plan.table_bytes)
    if share.has_head:
        brought = plan.table_bytes if placement.head == "streamed" else 0
        vocabulary = plan.architecture.config.vocab_size
        pool.book_device(LOGITS, brought + chunk_bytes(vocabulary, plan.dtype))
    on_cpu = plan.group.device.type == "cpu"
    if not on_cpu and (placement.embedding == "device" or placement.head == "resident"):
        pool.book(LOADING, plan.table_bytes)


def dequantised_bytes(plan: Plan) -> int:
    """Weights in the compute dtype: of the largest group, or of a layer with ``dequant=layer``."""
    quant = plan.recipe.quant
    if not quant.is_quantised:
        return 0
    weights = [math.prod(shape.shape) for shape in plan.frozen_format.groups.values()]
    values = sum(weights) if quant.dequant == "layer" else max(weights)
    return values * plan.dtype.itemsize


def adapter_values(plan: Plan) -> int:
    """Trained values of one layer."""
    meta = torch.device("meta")  # shapes without memory
    adapters = LayerAdapters(0, plan.architecture.groups, plan.recipe.lora, meta, plan.dtype)
    return adapters.flat.numel()


def adapter_bytes(plan: Plan) -> int:
    """What one layer's adapters take on the device: compute copies, and unless they are offloaded
    fp32 master and gradient and the optimizer's moments.
    """
    values, optim = adapter_values(plan), plan.recipe.optim
    trained = 0 if optim.offload else 8 * values + moment_bytes(optim, values)
    return plan.dtype.itemsize * values + trained


def saved_bytes(plan: Plan, policy: str) -> int:
    """What a layer with ``policy`` keeps on the device for one micro-batch's backward."""
    if policy == "recompute":
        on_device = plan.recipe.placement.boundaries == "device"
        return _rows(plan) * plan.architecture.hidden * plan.dtype.itemsize * on_device
    return 0 if policy == "offload" else activation_bytes(plan)


def moving_bytes(plan: Plan) -> int:
    """What offloaded activations take on the device while they leave and come back."""
    if "offload" not in plan.recipe.placement.policies(plan.architecture.layers):
        return 0
    return (UNDER_WAY + 2) * activation_bytes(plan)  # two come back: one is used, one is next


def activation_bytes(plan: Plan) -> int:
    """All that a layer's backward reads of one micro-batch: its input; q, k, v; attention's output
    and fp32 log-sum-exp; the second residual; gate and up.
    """
    a, rows = plan.architecture, _row_tokens(plan)
    attention = a.heads * a.head_dim
    qkv, gate_up = attention + 2 * a.kv_heads * a.head_dim, 2 * a.config.intermediate_size
    widths = (a.hidden, qkv, attention, a.hidden, gate_up)
    sizes = [rows * width * plan.dtype.itemsize for width in widths] + [rows * a.heads * 4]
    of_a_row = sum(round_up(size_bytes, ALIGN_BYTES) for size_bytes in sizes)
    return plan.recipe.size.micro_batch_size * of_a_row


def _rows(plan: Plan) -> int:
    """The most tokens of a micro-batch, padding included."""
    return plan.recipe.size.micro_batch_size * _row_tokens(plan)


def _row_tokens(plan: Plan) -> int:
    """What is reckoned for each row of a micro-batch: so much that the parts it may be divided into
    (``Strategy.divide``) fit where it did, each with padding of its own.
    """
    return round_up(plan.recipe.size.seq_len, ROW_MULTIPLE)


def own_policies(plan: Plan, share: Share) -> list[str]:
    """Of this rank's layers."""
    every = plan.recipe.placement.policies(plan.architecture.layers)
    return [every[layer] for layer in share.layers]


def policies(plan: Plan, share: Share, micro_batches: int) -> Policies:
    """What each of this rank's layers leaves for backward, and where."""
    made: dict[str, Policy] = {"keep": Keep()}
    used, device = own_policies(plan, share), plan.group.device
    if "offload" in used:
        places = micro_batches * used.count("offload")
        host = HostActivations(plan.pool.allocate(ACTIVATIONS), places, device)
        made["offload"] = Offload(host)
    boundaries: Boundaries = DeviceBoundaries()
    if "recompute" in used and plan.recipe.placement.boundaries == "host":
        shape = _boundary_shape(plan, share, micro_batches)
        buffer = plan.pool.allocate(BOUNDARIES)
        boundaries = HostBoundaries(buffer, shape, plan.dtype, device)
    made["recompute"] = Recompute(boundaries)
    return [made[policy] for policy in used]


def _boundary_shape(plan: Plan, share: Share, micro_batches: int) -> tuple[int, int, int]:
    layers = own_policies(plan, share).count("recompute")
    return micro_batches * layers, _rows(plan), plan.architecture.hidden


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
    on_host = None
    if plan.recipe.optim.offload:
        count = len(share.layers)
        masters = _by_layer(plan.pool.allocate(MASTERS), torch.float32, count)
        copies = _by_layer(plan.pool.allocate(COPIES), plan.dtype, count)
        on_host = [OnHost(*own) for own in zip(masters, copies, strict=True)]
    built = Decoder(
        plan.architecture,
        embedding if share.has_embedding else None,
        norm.to(plan.group.device),
        head if share.has_head else None,
        plan.recipe.lora,
        layers=share.layers,
        head_streamed=placement.head == "streamed",
        z_loss=plan.recipe.z_loss,
        on_host=on_host,
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
    on_host = _by_layer(plan.pool.allocate(GRADIENTS), torch.float32, len(adapters))
    return HostGradients(adapters, sync, plan.group.device, on_host)


def verified(plan: Plan, base: FrozenBase, store: Store, layers: Sequence[int]) -> VerifiedStore:
    """``store`` of ``layers``, checked against the cache's manifest."""
    expected = [base.checksum(layer) for layer in layers]
    return VerifiedStore(store, expected, plan.recipe.frozen.verify_every)


def files(base: FrozenBase) -> list[str]:
    """Where each layer lies on disk."""
    return [str(base.path(layer)) for layer in range(len(base))]


def _by_layer(buffer: Tensor, dtype: torch.dtype, layers: int) -> list[Tensor]:
    """uint8 host memory -> ``dtype`` (values,) for each layer."""
    return list(buffer.view(dtype).view(layers, -1).unbind(0))
