"""Qwen3 (dense): an RMS norm over each head of q and k before the rotation, its own head width."""

from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from fttrain.model.families.family import Family, layer_type_window

FAMILY = Family(
    model_type="qwen3",
    layer_class=Qwen3DecoderLayer,
    rotary_class=Qwen3RotaryEmbedding,
    qkv_bias=lambda config: config.attention_bias,
    o_bias=lambda config: config.attention_bias,
    qk_norm=True,
    window=layer_type_window,
)
