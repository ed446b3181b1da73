"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their architecture (SmolLM2, Yi, TinyLlama).

Full attention in every layer, no q/k norm, both norms before their block.
"""

from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from fttrain.model.families.family import Family

FAMILY = Family(
    model_type="llama",
    layer_class=LlamaDecoderLayer,
    rotary_class=LlamaRotaryEmbedding,
    qkv_bias=lambda config: config.attention_bias,
    o_bias=lambda config: config.attention_bias,
    mlp_bias=lambda config: config.mlp_bias,
)
