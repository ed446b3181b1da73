"""FLOPs and bytes of a layer: exact for the linears, by formula for attention
(``tests/schedule/test_flops.py`` counts the same on fake tensors).
"""

import math
from dataclasses import dataclass

from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture
from fttrain.model.head import chunk_rows
from fttrain.model.lora import target_indices
from fttrain.model.projection import QuantizedHead
from fttrain.strategy.context import BuildContext

ATTENTION_BACKWARD = 2.5  # times its forward: five GEMMs instead of two


@dataclass(frozen=True)
class LayerWork:
    """FLOPs of one token in one layer."""

    forward: float
    backward: float


def layer_work(a: Architecture, lora: LoraConfig, policy: str, seq_len: int) -> LayerWork:
    """FLOPs of a layer with rows of ``seq_len`` tokens, each one document.

    Backward computes gradients of the inputs and of A and B, none of a frozen weight, and A's
    projections again. ``recompute`` first runs the layer without ``down`` and its B.
    """
    frozen = lora_a = lora_b = 0
    targets = target_indices(a.groups, lora)
    for group in a.groups:
        wide = group.shape.in_features
        for member, out in enumerate(group.shape.out_features):
            frozen += 2 * wide * out
            if member in targets[group.shape.name]:
                lora_a += 2 * wide * lora.r
                lora_b += 2 * lora.r * out
    attention = 2 * 2 * (seq_len / 2) * a.heads * a.head_dim  # two GEMMs over half of a square
    forward = frozen + lora_a + lora_b + attention
    backward = frozen + 2 * (lora_a + lora_b) + ATTENTION_BACKWARD * attention
    if policy == "recompute":
        skipped = 2 * a.config.intermediate_size * a.hidden
        if targets["down"]:
            skipped += 2 * lora.r * a.hidden
        return LayerWork(forward, backward + forward - skipped)
    return LayerWork(forward, backward + lora_a)


def layer_values(a: Architecture) -> int:
    """Values that a layer's forward writes for one token: both residuals and their norms; q, k, v;
    attention's output; gate, up and their product. The time outside GEMMs grows with them.
    """
    attention = a.heads * a.head_dim
    qkv = attention + 2 * a.kv_heads * a.head_dim
    return 4 * a.hidden + qkv + attention + 3 * int(a.config.intermediate_size)


def head_flops(a: Architecture) -> float:
    """FLOPs of one token in the head: logits, and the gradient of the hidden state."""
    return 2.0 * 2 * a.hidden * int(a.config.vocab_size)


def weight_bytes(context: BuildContext) -> int:
    """Bytes of a layer's linears in the compute dtype, as dequantised."""
    shapes = context.frozen_format.groups.values()
    return sum(math.prod(group.shape) for group in shapes) * context.dtype.itemsize


def dequantisations(context: BuildContext, micro_batches: int) -> int:
    """Dequantisations of a layer in a pass of ``micro_batches``."""
    if not context.spec.quant.is_quantised:
        return 0
    return 1 if context.spec.quant.dequant == "layer" else micro_batches


def head_dequantised_bytes(context: BuildContext) -> int:
    """Bytes that a head in 4 bits dequantises for one micro-batch: its table, twice a chunk."""
    if context.spec.placement.lm_head != "quantized":
        return 0
    size = context.spec.size
    tokens = math.ceil(size.micro_batch_tokens * size.target_share)
    vocabulary = int(context.architecture.config.vocab_size)
    rows = chunk_rows(vocabulary, context.dtype, tokens, QuantizedHead.chunk_factor)
    return 2 * context.table_bytes * math.ceil(tokens / rows)
