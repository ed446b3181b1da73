"""Models of the sizes that people ask about, from their shipped configurations: no download."""

import math
from dataclasses import dataclass

import torch

from fttrain.model.decoder import Architecture
from fttrain.plan.architectures import shipped_config
from fttrain.quant.config import QuantConfig


@dataclass(frozen=True)
class Shape:
    """A model by the usual name of its size and the file of its configuration."""

    size: str
    file: str  # stem in conf/model/architectures/


SHAPES = {
    "Llama-2-7B": Shape("7B", "llama2_7b"),
    "Llama-3.1-8B": Shape("8B", "llama3_8b"),
    "Llama-2-13B": Shape("13B", "llama2_13b"),
    "Qwen3-14B": Shape("14B", "qwen3_14b"),
    "Qwen3-32B": Shape("32B", "qwen3_32b"),
    "CodeLlama-34B": Shape("34B", "codellama_34b"),
    "Llama-3.1-70B": Shape("70B", "llama3_70b"),  # Llama 3.3 has the same shape
    "Qwen2.5-72B": Shape("72B", "qwen2_5_72b"),
}
# Models of published figures that the tables do not list
OTHERS = {
    "LLaMA-33B": Shape("33B", "llama1_33b"),
    "LLaMA-65B": Shape("65B", "llama1_65b"),
}


def architecture(name: str) -> Architecture:
    """The architecture of a model in ``SHAPES`` or ``OTHERS``."""
    return Architecture(shipped_config((SHAPES | OTHERS)[name].file))


def size(name: str) -> str:
    """The usual name of the size of a model in ``SHAPES`` or ``OTHERS``, such as 70B."""
    return (SHAPES | OTHERS)[name].size


def layer_parameters(a: Architecture) -> int:
    """Parameters of one decoder layer, norms and biases among them."""
    layout = a.frozen_format(QuantConfig("none"), torch.bfloat16).layout
    return sum(math.prod(slot.shape) for slot in layout.slots.values())


def parameters(a: Architecture) -> int:
    """Parameters of the whole model."""
    tables = (1 if a.tied else 2) * int(a.config.vocab_size) * a.hidden
    return a.layers * layer_parameters(a) + tables + a.hidden
