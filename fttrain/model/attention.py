"""The attention module that a decoder layer calls: norm, rotation and attention in one node.

Legend: N tokens, H query heads, K key and value heads, D width of a head, C hidden width. Tensors
are in the compute dtype where no other stands beside them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fttrain.model.attention_op import varlen_attention, varlen_attention_backward
from fttrain.model.functions import rms_norm, rms_norm_backward, rotate_
from fttrain.model.linears import LayerState, LinearGroup
from fttrain.model.tiles import apply_linears


class _RotaryAttention(torch.autograd.Function):
    """q/k norm, rotary embedding and attention in one autograd node.

    Saved for backward: q, k and v as the projection left them (norm and rotation are computed again
    in backward), the output, its log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, attention: "Attention") -> Tensor:
        lengths = list(attention.state.lengths)
        rotated = attention.rotated(qkv, cos, sin)  # qkv (N, (H + 2K) * D)
        # out (N, H, D), lse fp32 (H, N)
        out, lse = varlen_attention(*rotated, lengths, attention.scale, attention.window)
        ctx.save_for_backward(qkv, out, lse)
        ctx.cos, ctx.sin, ctx.attention, ctx.lengths = cos, sin, attention, lengths
        # Backward follows a recomputation at once, so its inputs are retained for that moment.
        ctx.rotated = rotated if attention.state.recomputing else None
        return out.flatten(1)  # (N, H * D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        qkv, out, lse = ctx.saved_tensors
        attention: Attention = ctx.attention
        rotated = ctx.rotated or attention.rotated(qkv, ctx.cos, ctx.sin)
        ctx.rotated = None  # else it lives until all of the layer's backward is over
        # (N, H + 2K, D), from grad (N, H * D)
        grads = varlen_attention_backward(
            grad.view(out.shape), *rotated, out, lse, ctx.lengths, attention.scale, attention.window
        )
        return attention.rotated_backward(grads, qkv, ctx.cos, ctx.sin), None, None, None


class Attention(nn.Module):
    """The attention in transformers' decoder layer: the same call, over packed documents."""

    def __init__(
        self,
        qkv: LinearGroup,
        o: LinearGroup,
        state: LayerState,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int = 0,
        qk_norm_eps: float | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.o, self.state = qkv, o, state
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.window = window  # 0: full causal attention
        self.qk_norm_eps = qk_norm_eps  # None: the family has no norm on q and k
        self.scale = head_dim**-0.5 if scale is None else scale  # of q k^T

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        """``hidden_states`` (N, C), cos and sin (N, D) -> the attention's output (N, C)."""
        cos, sin = position_embeddings
        qkv = apply_linears(hidden_states, self.qkv)  # (N, (H + 2K) * D)
        attend: Callable[..., Tensor] | None = getattr(self.state.cache, "attend", None)
        if attend is not None:
            out = attend(self, *self.rotated(qkv, cos, sin))  # (N, H * D)
        else:
            out = _RotaryAttention.apply(qkv, cos, sin, self)  # (N, H * D)
        return apply_linears(out, self.o), None

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of ``qkv`` (N, (H + 2K) * D): q (N, H, D), k (N, K, D), v (N, K, D)."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)  # (N, H + 2K, D)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v

    def _norm_weights(self) -> tuple[Tensor, Tensor]:
        frozen = self.qkv.frozen
        return frozen.tensor("self_attn.q_norm.weight"), frozen.tensor("self_attn.k_norm.weight")

    def rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated q (N, H, D) and k (N, K, D), and v (N, K, D)."""
        q, k, v = self._split(qkv)
        if self.qk_norm_eps is None:
            # q and k together (N, H + K, D): one kernel rotates both
            rotated = rotate_(
                qkv.view(qkv.shape[0], -1, self.head_dim)[:, : -self.kv_heads].clone(), cos, sin
            )
            return rotated[:, : self.heads], rotated[:, self.heads :], v
        q_weight, k_weight = self._norm_weights()
        q, k = rms_norm(q, q_weight, self.qk_norm_eps), rms_norm(k, k_weight, self.qk_norm_eps)
        return rotate_(q, cos, sin), rotate_(k, cos, sin), v

    def rotated_backward(self, grads: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Gradient of ``qkv`` (N, (H + 2K) * D) from the gradients of ``rotated``'s results
        (N, H + 2K, D), which are overwritten.
        """
        rotate_(grads[:, : -self.kv_heads], cos, -sin)
        if self.qk_norm_eps is not None:
            q, k, _ = self._split(qkv)
            grad_q, grad_k, _ = grads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            for grad, x, weight in zip((grad_q, grad_k), (q, k), self._norm_weights(), strict=True):
                rms_norm_backward(grad, x, weight, self.qk_norm_eps, out=grad)
        return grads.flatten(1)
