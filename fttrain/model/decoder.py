"""The decoder: transformers' layers as shells, with our attention, MLP and norms in them.

``Decoder.parameters()`` are the trained parameters. Frozen tensors are not part of the modules: a
store hands out a layer's bytes, and the schedule binds them to the layer's state for each use.

Legend: N tokens, C hidden width, D width of a head, V vocabulary. Tensors are in the compute dtype
where no other stands beside them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fttrain.model.attention import Attention
from fttrain.model.families import family_of
from fttrain.model.families.family import Family
from fttrain.model.head import Embedding, Head
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.model.linears import LayerState, LinearGroup
from fttrain.model.lora import GroupMembers
from fttrain.model.projection import Projection
from fttrain.model.tiles import apply_linears
from fttrain.objective.objective import Objective
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat, GroupShape


class Architecture:
    """Shapes of a model, derived from transformers' config; the same for all layers."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.family: Family = family_of(config)
        self.layers: int = config.num_hidden_layers
        self.hidden: int = config.hidden_size
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.eps: float = config.rms_norm_eps
        self.tied: bool = config.tie_word_embeddings
        self.groups = self._groups()

    def _groups(self) -> tuple[GroupMembers, ...]:
        family, config = self.family, self.config
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlp = config.intermediate_size
        shapes = {  # group -> its input width, its members' output widths, bias
            "qkv": (self.hidden, (q, kv, kv), family.qkv_bias(config)),
            "o": (q, (self.hidden,), family.o_bias(config)),
            "gate_up": (self.hidden, (mlp, mlp), family.mlp_bias(config)),
            "down": (mlp, (self.hidden,), family.mlp_bias(config)),
        }
        return tuple(
            GroupMembers(GroupShape(name, *shapes[name]), facts.paths)
            for name, facts in family.groups
        )

    def frozen_format(self, quant: QuantConfig, dtype: torch.dtype) -> FrozenFormat:
        """The layout of one layer's frozen tensors."""
        norms: dict[str, tuple[int, ...]] = {
            facts.norm: (self.hidden,) for _, facts in self.family.groups if facts.norm
        }
        if self.family.qk_norm:
            norms |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in ("q", "k")}
        return FrozenFormat((group.shape for group in self.groups), norms, quant, dtype)


class Mlp(nn.Module):
    """The MLP in transformers' decoder layer. Its SwiGLU is the prologue of ``down``."""

    def __init__(self, gate_up: LinearGroup, down: LinearGroup, tile_tokens: int) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.tile_tokens = tile_tokens  # tokens at a time, 0: all

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Output (N, C) of ``hidden_states`` (N, C)."""
        return apply_linears(hidden_states, self.gate_up, self.down, tile_tokens=self.tile_tokens)


class Layer:
    """One decoder layer: transformers' shell, the state the schedule binds, and the adapters."""

    def __init__(
        self,
        architecture: Architecture,
        adapters: LayerAdapters,
        mlp_tile_tokens: int = 0,
    ) -> None:
        """``mlp_tile_tokens``: tokens of an MLP tile, a multiple of ``MASK_TOKENS``; 0: all."""
        self.index = adapters.layer  # among the layers of the whole model
        self.state = LayerState()
        self.adapters = adapters
        self.shell = self._build_shell(architecture, mlp_tile_tokens)

    def _build_shell(self, architecture: Architecture, mlp_tile_tokens: int) -> nn.Module:
        family, facts = architecture.family, dict(architecture.family.groups)
        linears = {
            group.shape.name: LinearGroup(
                group.shape,
                self.index,
                self.state,
                self.adapters.groups.get(group.shape.name),
                facts[group.shape.name].prologue,
                facts[group.shape.name].norm,
                eps=architecture.eps,
                unread=group.shape.name in family.unread_outputs,
            )
            for group in architecture.groups
        }
        with torch.device("meta"):
            shell = family.layer_class(architecture.config, self.index)
        shell.self_attn = Attention(
            linears["qkv"],
            linears["o"],
            self.state,
            architecture.heads,
            architecture.kv_heads,
            architecture.head_dim,
            window=family.window(architecture.config, self.index),
            qk_norm_eps=architecture.eps if family.qk_norm else None,
            scale=family.attention_scale(architecture.config),
        )
        shell.mlp = Mlp(linears["gate_up"], linears["down"], mlp_tile_tokens)
        for group_facts in facts.values():
            if group_facts.norm:  # computed in the group's prologue
                setattr(shell, group_facts.norm.removesuffix(".weight"), nn.Identity())
        return shell

    def __call__(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Output (N, C) of ``hidden`` (N, C); ``rotary``: cos and sin (N, D)."""
        return self.shell(hidden, position_embeddings=rotary)


class Decoder:
    """Embedding, layers and head. Stores know where the layers' bytes live, schedules the order.

    A stage of a pipeline has some of the layers, the first stage the embedding, the last the head.
    """

    def __init__(
        self,
        architecture: Architecture,
        embedding: Tensor | None,
        final_norm: Tensor,
        head: Projection | None,
        adapters: Iterable[LayerAdapters],
        *,
        z_loss: float = 0.0,
        objective: Objective | None = None,
        mlp_tile_tokens: int = 0,
    ) -> None:
        """``final_norm`` (C,), on the compute device and in the compute dtype, determines both.

        ``embedding`` (V, C) may be in host memory; ``adapters``: of each layer of this stage;
        ``z_loss`` and ``objective``: as ``Head``; ``mlp_tile_tokens``: as ``Layer``.
        """
        family, config = architecture.family, architecture.config
        self.device, self.dtype = final_norm.device, final_norm.dtype
        self.architecture = architecture
        self._embedding = (
            None
            if embedding is None
            else Embedding(embedding, family.embedding_scale(config), self.device)
        )
        self._head = (
            None
            if head is None
            else Head(
                final_norm,
                head,
                architecture.eps,
                family.logit_scale(config),
                z_loss,
                objective,
            )
        )
        self.layers = [
            Layer(architecture, layer_adapters, mlp_tile_tokens) for layer_adapters in adapters
        ]
        self._rotary = family.rotary_class(config).to(self.device)
        self._like = final_norm.new_empty(0)  # device and dtype of rotary embeddings

    @property
    def embedding(self) -> Embedding:
        assert self._embedding is not None, "only the first stage embeds"
        return self._embedding

    @property
    def head(self) -> Head:
        assert self._head is not None, "only the last stage has the head"
        return self._head

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters: one flat fp32 tensor a layer."""
        return [layer.adapters.flat for layer in self.layers]

    @torch.no_grad()
    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (N, D) of ``position_ids`` int64 (N,)."""
        # each (1, N, D)
        cos, sin = self._rotary(self._like, position_ids.to(self.device).unsqueeze(0))
        return cos[0], sin[0]

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Input (N, C) of the first layer, of ``input_ids`` int64 (N,)."""
        return self.embedding(input_ids)
