"""The parts that native strategies share: layers, embedding and head, and saved activations.

``reserve_slice`` reserves their memory of device and host. Once the ledger is checked, the frozen
base is opened and the parts are built.
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
from fttrain.store.layer_inputs import (
    DeviceLayerInputs,
    HostLayerInputs,
    LayerInputs,
    layer_input_bytes,
)
from fttrain.store.verify import VerifiedStore
from fttrain.strategy import trainable_state
from fttrain.strategy.context import BuildContext
from fttrain.strategy.embedding_head import load_ends, reserve_ends
from fttrain.util.units import round_up


@dataclass(frozen=True)
class ModelSlice:
    """The rank's part of the model: layers, and whether it has the embedding and the head."""

    layers: range
    has_embedding: bool = True
    has_head: bool = True


def reserve_slice(context: BuildContext, model_slice: ModelSlice, micro_batches: int) -> None:
    """Reserve what every native strategy needs. ``micro_batches``: the most in flight."""
    _reserve_saved(context, model_slice, micro_batches)
    reserve_ends(context, model_slice.has_embedding, model_slice.has_head)
    context.ledger.reserve(MemoryPart.DEQUANTIZED_WEIGHTS, dequantised_bytes(context))
    trainable_state.reserve_trainable(context, len(model_slice.layers))


def _reserve_saved(context: BuildContext, model_slice: ModelSlice, micro_batches: int) -> None:
    """Reserve the layers' saved activations."""
    ledger, used = context.ledger, slice_policies(context, model_slice)
    ledger.reserve(
        MemoryPart.ACTIVATIONS, micro_batches * sum(saved_bytes(context, policy) for policy in used)
    )
    ledger.reserve(MemoryPart.ACTIVATION_TRANSFERS, transfer_bytes(context))
    if "offload" in used:
        ledger.reserve(
            MemoryPart.OFFLOADED_ACTIVATIONS,
            micro_batches * used.count("offload") * activation_bytes(context),
        )
    if "recompute" in used and context.spec.placement.layer_inputs == "host":
        shape = _layer_inputs_shape(context, model_slice, micro_batches)
        ledger.reserve(MemoryPart.LAYER_INPUTS, layer_input_bytes(shape, context.dtype))


def dequantised_bytes(context: BuildContext) -> int:
    """Bytes of the dequantised weights: of the largest linear group, or of a layer with
    ``dequant=layer``.
    """
    quant = context.spec.quant
    if not quant.is_quantised:
        return 0
    weights = [math.prod(shape.shape) for shape in context.frozen_format.groups.values()]
    values = sum(weights) if quant.dequant == "layer" else max(weights)
    return values * context.dtype.itemsize


def saved_bytes(context: BuildContext, policy: str) -> int:
    """Bytes that a layer with ``policy`` saves on the device for one micro-batch's backward."""
    if policy == "recompute":
        if context.spec.placement.layer_inputs == "host":
            return 0
        tokens = context.spec.size.micro_batch_tokens
        return tokens * context.architecture.hidden * context.dtype.itemsize
    return 0 if policy == "offload" else activation_bytes(context)


def transfer_bytes(context: BuildContext) -> int:
    """Bytes on the device of offloaded activations that are being copied out and back."""
    if "offload" not in context.spec.placement.policies(context.architecture.layers):
        return 0
    # Two passes are back at once: one is read, the next is prefetched.
    return (UNDER_WAY + 2) * activation_bytes(context)


def activation_bytes(context: BuildContext) -> int:
    """Bytes of all tensors that a layer's backward reads of one micro-batch: its input; q, k, v;
    attention's output and fp32 log-sum-exp; the second residual; gate and up; with DoRA the outputs
    of o and down.
    """
    a, rows = context.architecture, context.spec.size.row_tokens
    attention = a.heads * a.head_dim
    qkv, gate_up = attention + 2 * a.kv_heads * a.head_dim, 2 * a.config.intermediate_size
    widths = [a.hidden, qkv, attention, a.hidden, gate_up]
    if context.spec.lora.use_dora:  # magnitudes' backward reads their linears' outputs
        targets = target_indices(a.groups, context.spec.lora)
        widths += [a.hidden for group in ("o", "down") if targets[group]]
    sizes = [rows * width * context.dtype.itemsize for width in widths] + [rows * a.heads * 4]
    of_a_row = sum(round_up(size_bytes, ALIGN_BYTES) for size_bytes in sizes)
    return context.spec.size.micro_batch_size * of_a_row


def slice_policies(context: BuildContext, model_slice: ModelSlice) -> list[str]:
    """The activation policy of each of this rank's layers."""
    every = context.spec.placement.policies(context.architecture.layers)
    return [every[layer] for layer in model_slice.layers]


def build_policies(context: BuildContext, model_slice: ModelSlice, micro_batches: int) -> Policies:
    """The activation policy objects of this rank's layers. ``micro_batches``: the most in
    flight.
    """
    built: dict[str, Policy] = {"keep": Keep()}
    used, device = slice_policies(context, model_slice), context.group.device
    if "offload" in used:
        slots = micro_batches * used.count("offload")
        host = HostActivations(
            context.ledger.allocate(MemoryPart.OFFLOADED_ACTIVATIONS), slots, device
        )
        built["offload"] = Offload(host)
    inputs: LayerInputs = DeviceLayerInputs()
    if "recompute" in used and context.spec.placement.layer_inputs == "host":
        shape = _layer_inputs_shape(context, model_slice, micro_batches)
        buffer = context.ledger.allocate(MemoryPart.LAYER_INPUTS)
        inputs = HostLayerInputs(buffer, shape, context.dtype, device)
    built["recompute"] = Recompute(inputs)
    return [built[policy] for policy in used]


def _layer_inputs_shape(
    context: BuildContext, model_slice: ModelSlice, micro_batches: int
) -> tuple[int, int, int]:
    layers = slice_policies(context, model_slice).count("recompute")
    return micro_batches * layers, context.spec.size.micro_batch_tokens, context.architecture.hidden


def build_decoder(context: BuildContext, base: FrozenBase, model_slice: ModelSlice) -> Decoder:
    """The decoder of this rank's layers, embedding and head; adapters at their initial values."""
    embedding, head = load_ends(context, base, model_slice.has_embedding, model_slice.has_head)
    norm = torch.empty(context.architecture.hidden, dtype=context.dtype)
    base.read_end("final_norm", norm)
    return Decoder(
        context.architecture,
        embedding,
        norm.to(context.group.device),
        head,
        trainable_state.adapters(context, model_slice.layers),
        z_loss=context.spec.z_loss,
        objective=context.spec.objective,
        mlp_tile_tokens=context.spec.placement.tile_tokens,
    )


def verified_store(
    context: BuildContext, base: FrozenBase, store: Store, layers: Sequence[int]
) -> VerifiedStore:
    """``store`` of ``layers`` with checks against the cache's manifest."""
    expected = [base.checksum(layer) for layer in layers]
    return VerifiedStore(store, expected, context.spec.frozen.verify_every)


def layer_files(base: FrozenBase) -> list[str]:
    """The file of each layer."""
    return [str(base.path(layer)) for layer in range(len(base))]
