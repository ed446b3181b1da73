"""The parts that strategies share: layers and ends, and what is kept for backward.

First ``book`` says what they need of device and host; once all has been compared with what there
is, the frozen base is opened and the parts are made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fttrain.memory.parts import MemoryPart
from fttrain.model.decoder import Decoder
from fttrain.model.lora import target_indices
from fttrain.schedule.activations import Keep, Offload, Policies, Policy, Recompute
from fttrain.store import FrozenBase, Store
from fttrain.store.activations import ALIGN_BYTES, UNDER_WAY, HostActivations
from fttrain.store.boundary import Boundaries, DeviceBoundaries, HostBoundaries, boundary_bytes
from fttrain.store.verify import VerifiedStore
from fttrain.strategy import trained
from fttrain.strategy.ends import book_ends, load_ends
from fttrain.strategy.recipe import Plan
from fttrain.util.units import round_up

# What the books call each part.


@dataclass(frozen=True)
class Share:
    """This rank's part of the model."""

    layers: range
    has_embedding: bool = True
    has_head: bool = True


def book(plan: Plan, share: Share, micro_batches: int) -> None:
    """Memory of what every strategy has. ``micro_batches``: kept for backward at once."""
    _book_saved(plan, share, micro_batches)
    book_ends(plan, share.has_embedding, share.has_head)
    plan.pool.reserve(MemoryPart.DEQUANTIZED_WEIGHTS, dequantised_bytes(plan))
    trained.book(plan, len(share.layers))


def _book_saved(plan: Plan, share: Share, micro_batches: int) -> None:
    """What layers leave for backward."""
    pool, used = plan.pool, own_policies(plan, share)
    pool.reserve(MemoryPart.ACTIVATIONS, micro_batches * sum(saved_bytes(plan, policy) for policy in used))
    pool.reserve(MemoryPart.ACTIVATION_TRANSFERS, moving_bytes(plan))
    if "offload" in used:
        pool.reserve(MemoryPart.OFFLOADED_ACTIVATIONS, micro_batches * used.count("offload") * activation_bytes(plan))
    if "recompute" in used and plan.recipe.placement.boundaries == "host":
        shape = _boundary_shape(plan, share, micro_batches)
        pool.reserve(MemoryPart.LAYER_INPUTS, boundary_bytes(shape, plan.dtype))


def dequantised_bytes(plan: Plan) -> int:
    """Weights in the compute dtype: of the largest group, or of a layer with ``dequant=layer``."""
    quant = plan.recipe.quant
    if not quant.is_quantised:
        return 0
    weights = [math.prod(shape.shape) for shape in plan.frozen_format.groups.values()]
    values = sum(weights) if quant.dequant == "layer" else max(weights)
    return values * plan.dtype.itemsize


def saved_bytes(plan: Plan, policy: str) -> int:
    """What a layer with ``policy`` keeps on the device for one micro-batch's backward."""
    if policy == "recompute":
        if plan.recipe.placement.boundaries == "host":
            return 0
        tokens = plan.recipe.size.micro_batch_tokens
        return tokens * plan.architecture.hidden * plan.dtype.itemsize
    return 0 if policy == "offload" else activation_bytes(plan)


def moving_bytes(plan: Plan) -> int:
    """What offloaded activations take on the device while they leave and come back."""
    if "offload" not in plan.recipe.placement.policies(plan.architecture.layers):
        return 0
    return (UNDER_WAY + 2) * activation_bytes(plan)  # two come back: one is used, one is next


def activation_bytes(plan: Plan) -> int:
    """All that a layer's backward reads of one micro-batch: its input; q, k, v; attention's output
    and fp32 log-sum-exp; the second residual; gate and up; with DoRA what o and down gave.
    """
    a, rows = plan.architecture, plan.recipe.size.row_tokens
    attention = a.heads * a.head_dim
    qkv, gate_up = attention + 2 * a.kv_heads * a.head_dim, 2 * a.config.intermediate_size
    widths = [a.hidden, qkv, attention, a.hidden, gate_up]
    if plan.recipe.lora.use_dora:  # magnitudes read what their linears gave: qkv, gate and up, too
        targets = target_indices(a.groups, plan.recipe.lora)
        widths += [a.hidden for group in ("o", "down") if targets[group]]
    sizes = [rows * width * plan.dtype.itemsize for width in widths] + [rows * a.heads * 4]
    of_a_row = sum(round_up(size_bytes, ALIGN_BYTES) for size_bytes in sizes)
    return plan.recipe.size.micro_batch_size * of_a_row


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
        host = HostActivations(plan.pool.allocate(MemoryPart.OFFLOADED_ACTIVATIONS), places, device)
        made["offload"] = Offload(host)
    boundaries: Boundaries = DeviceBoundaries()
    if "recompute" in used and plan.recipe.placement.boundaries == "host":
        shape = _boundary_shape(plan, share, micro_batches)
        buffer = plan.pool.allocate(MemoryPart.LAYER_INPUTS)
        boundaries = HostBoundaries(buffer, shape, plan.dtype, device)
    made["recompute"] = Recompute(boundaries)
    return [made[policy] for policy in used]


def _boundary_shape(plan: Plan, share: Share, micro_batches: int) -> tuple[int, int, int]:
    layers = own_policies(plan, share).count("recompute")
    return micro_batches * layers, plan.recipe.size.micro_batch_tokens, plan.architecture.hidden


def decoder(plan: Plan, base: FrozenBase, share: Share) -> Decoder:
    """This rank's layers and ends; adapters at their start."""
    embedding, head = load_ends(plan, base, share.has_embedding, share.has_head)
    norm = torch.empty(plan.architecture.hidden, dtype=plan.dtype)
    base.read_end("final_norm", norm)
    return Decoder(
        plan.architecture,
        embedding,
        norm.to(plan.group.device),
        head,
        trained.adapters(plan, share.layers),
        z_loss=plan.recipe.z_loss,
        mlp_tile_tokens=plan.recipe.placement.tile_tokens,
    )


def verified(plan: Plan, base: FrozenBase, store: Store, layers: Sequence[int]) -> VerifiedStore:
    """``store`` of ``layers``, checked against the cache's manifest."""
    expected = [base.checksum(layer) for layer in layers]
    return VerifiedStore(store, expected, plan.recipe.frozen.verify_every)


def files(base: FrozenBase) -> list[str]:
    """Where each layer lies on disk."""
    return [str(base.path(layer)) for layer in range(len(base))]
