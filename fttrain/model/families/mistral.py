"""Mistral 7B and its successors: Llama without biases.

v0.1 has one sliding window for all layers.
"""

from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRotaryEmbedding

from fttrain.model.families.family import Family

FAMILY = Family(
    model_type="mistral",
    layer_class=MistralDecoderLayer,
    rotary_class=MistralRotaryEmbedding,
    window=lambda config, layer: config.sliding_window or 0,
)
