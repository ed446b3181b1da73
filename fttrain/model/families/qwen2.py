"""Qwen2 and Qwen2.5: biases on q, k and v, none on o.

A sliding window in the upper layers where it is switched on.
"""

from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from fttrain.model.families.family import Family, layer_type_window

FAMILY = Family(
    model_type="qwen2",
    layer_class=Qwen2DecoderLayer,
    rotary_class=Qwen2RotaryEmbedding,
    qkv_bias=lambda config: True,
    window=layer_type_window,
)
