"""What a family's page states."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

# transformers' configuration of the architecture: its fields differ from family to family
Config = Any


@dataclass(frozen=True)
class Family:
    """An architecture: transformers' layer is the shell, the rest are its facts."""

    model_type: str  # as in config.json
    # transformers' decoder layer: residuals and their order
    layer_class: Callable[[Config, int], nn.Module]
    rotary_class: Callable[[Config], nn.Module]
    qkv_bias: Callable[[Config], bool]
    o_bias: Callable[[Config], bool]
    mlp_bias: Callable[[Config], bool]
    window: Callable[[Config, int], int]  # tokens a token of this layer sees, 0: all before it
    qk_norm: bool  # RMS norm over each head of q and k
    # groups whose output goes into a residual and is never read by backward
    unread_outputs: tuple[str, ...]
    embedding_scale: float = 1.0
    logit_scale: float = 1.0


def layer_type_window(config: Config, layer: int) -> int:
    """Sliding attention where ``layer_types`` says so."""
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else 0
