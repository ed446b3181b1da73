"""Models of the sizes that people ask about, from the figures of their config.json: no download."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from fttrain.model.decoder import Architecture
from fttrain.quant.config import QuantConfig

HEAD_DIM = 128  # of all of them


@dataclass(frozen=True)
class Shape:
    """A model's figures; head and embedding are two tables."""

    size: str  # as people call it
    config: Callable[..., PretrainedConfig]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def architecture(self) -> Architecture:
        config = self.config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            head_dim=HEAD_DIM,
            tie_word_embeddings=False,
        )
        return Architecture(config)


SHAPES = {
    "Llama-2-7B": Shape("7B", LlamaConfig, 4096, 11008, 32, 32, 32, 32000),
    "Llama-3.1-8B": Shape("8B", LlamaConfig, 4096, 14336, 32, 32, 8, 128256),
    "Llama-2-13B": Shape("13B", LlamaConfig, 5120, 13824, 40, 40, 40, 32000),
    "Qwen3-14B": Shape("14B", Qwen3Config, 5120, 17408, 40, 40, 8, 151936),
    "Qwen3-32B": Shape("32B", Qwen3Config, 5120, 25600, 64, 64, 8, 151936),
    "CodeLlama-34B": Shape("34B", LlamaConfig, 8192, 22016, 48, 64, 8, 32000),
    "Llama-3.1-70B": Shape("70B", LlamaConfig, 8192, 28672, 80, 64, 8, 128256),
    "Qwen2.5-72B": Shape("72B", Qwen2Config, 8192, 29568, 80, 64, 8, 152064),
}
# What figures were published for beside those
OTHERS = {
    "LLaMA-33B": Shape("33B", LlamaConfig, 6656, 17920, 60, 52, 52, 32000),
    "LLaMA-65B": Shape("65B", LlamaConfig, 8192, 22016, 80, 64, 64, 32000),
}


def architecture(name: str) -> Architecture:
    """Of a model in ``SHAPES`` or ``OTHERS``."""
    return (SHAPES | OTHERS)[name].architecture()


def size(name: str) -> str:
    """What people call the size of a model in ``SHAPES`` or ``OTHERS``."""
    return (SHAPES | OTHERS)[name].size


def layer_parameters(a: Architecture) -> int:
    """Of one decoder layer, norms and biases among them."""
    layout = a.frozen_format(QuantConfig("none"), torch.bfloat16).layout
    return sum(math.prod(slot.shape) for slot in layout.slots.values())


def parameters(a: Architecture) -> int:
    """Of the whole model."""
    tables = (1 if a.tied else 2) * int(a.config.vocab_size) * a.hidden
    return a.layers * layer_parameters(a) + tables + a.hidden
