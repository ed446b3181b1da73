"""The page of a model family: all that the decoder must know and the config file does not say.

A layer is two blocks with a residual each. A block begins with a norm, and may end with another:

    h ──┬── norm before ── qkv ── q/k norm ── rotary ── attention ── o ── norm after ──┬── +
        └──────────────────────────────────────────────────────────────────────────────┘
    h ──┬── norm before ── gate, up ── activation ── down ── norm after ───────────────┬── +
        └──────────────────────────────────────────────────────────────────────────────┘

Each page states what differs from the defaults here, which are Llama's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fttrain.util.errors import UserError

# transformers' configuration of the architecture: its fields differ from family to family
Config = Any


def no_bias(config: Config) -> bool:
    """The rule of linears without a bias."""
    return False


def full_attention(config: Config, layer: int) -> int:
    """The window of layers whose tokens see all tokens before them: 0."""
    return 0


def layer_type_window(config: Config, layer: int) -> int:
    """The window of layers that ``layer_types`` calls sliding; 0 for the others."""
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else 0


def one_rotary(config: Config, layer: int) -> str:
    """The rotary table of models that have one for all layers."""
    return "default"


def unscaled(config: Config) -> float:
    """The scale of embeddings and logits that are used as they are."""
    return 1.0


def absent(config: Config) -> float | None:
    """The rule of a family that has no such number."""
    return None


@dataclass(frozen=True)
class GroupFacts:
    """A group of linears that share an input: their names in the layer, and what comes before
    them in the same autograd node.
    """

    paths: tuple[str, ...]  # such as self_attn.q_proj
    prologue: str = "none"  # none | rmsnorm | swiglu, computed again in backward
    norm: str = ""  # the frozen weight of an rmsnorm prologue, (C,)


GATED_PRE_NORM = {
    "qkv": GroupFacts(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "rmsnorm",
        "input_layernorm.weight",
    ),
    "o": GroupFacts(("self_attn.o_proj",)),
    "gate_up": GroupFacts(
        ("mlp.gate_proj", "mlp.up_proj"), "rmsnorm", "post_attention_layernorm.weight"
    ),
    "down": GroupFacts(("mlp.down_proj",), "swiglu"),
}
PROLOGUES = ("none", "rmsnorm", "swiglu")  # that model/linears.py computes


@dataclass(frozen=True)
class Family:
    """An architecture: transformers' layer is the shell, the rest are its facts."""

    model_type: str  # as in config.json
    # transformers' decoder layer: residuals and their order
    layer_class: Callable[[Config, int], nn.Module]
    rotary_class: Callable[[Config], nn.Module]
    # Linears: groups in the order of the layer, with prologue and activation
    groups: tuple[tuple[str, GroupFacts], ...] = tuple(GATED_PRE_NORM.items())
    qkv_bias: Callable[[Config], bool] = no_bias
    o_bias: Callable[[Config], bool] = no_bias
    mlp_bias: Callable[[Config], bool] = no_bias
    # Norms: those before a block are prologues of its first group
    norm_after_attention: str = ""  # frozen weight (C,) of a norm on o's output; "": none
    norm_after_mlp: str = ""  # likewise on down's output
    norm_offset: float = 0.0  # added to each norm's weight: 1.0 where x is scaled by 1 + w
    qk_norm: bool = False  # RMS norm over each head of q and k, before the rotation
    # Attention, by layer
    window: Callable[[Config, int], int] = full_attention  # tokens that a token sees, 0: all
    rotary: Callable[[Config, int], str] = one_rotary  # name of the layer's rotary table
    attention_scale: Callable[[Config], float | None] = absent  # of q k^T; None: D ** -0.5
    attention_soft_cap: Callable[[Config], float | None] = absent  # cap tanh(score / cap)
    # Ends
    embedding_scale: Callable[[Config], float] = unscaled
    logit_scale: Callable[[Config], float] = unscaled
    logit_soft_cap: Callable[[Config], float | None] = absent

    @property
    def unread_outputs(self) -> tuple[str, ...]:
        """Groups whose output only joins a residual, so that backward never reads it."""
        return () if self.norm_after_mlp else ("down",)


def check_supported(family: Family, config: Config) -> None:
    """Raise UserError for what a page can state and the engine does not compute."""
    layers = range(config.num_hidden_layers)
    missing = {
        "a norm after attention": family.norm_after_attention,
        "a norm after the MLP": family.norm_after_mlp,
        "norms that scale by 1 + w": family.norm_offset,
        "several rotary tables": len({family.rotary(config, layer) for layer in layers}) > 1,
        "a soft cap of attention scores": family.attention_soft_cap(config),
        "a soft cap of logits": family.logit_soft_cap(config),
    } | {
        f"prologue {facts.prologue} of {name}": facts.prologue not in PROLOGUES
        for name, facts in family.groups
    }
    stated = [what for what, value in missing.items() if value]
    if stated:
        raise UserError(
            f"model: architecture {family.model_type!r} has {', '.join(stated)}, which is not "
            "supported"
        )
