"""Norm, SwiGLU and rotary embedding with their backward passes, as plain functions.

They save nothing themselves: whoever calls them keeps the inputs it wants to keep and recomputes
the rest.

Legend: N tokens, C width of the input, F width of the MLP, H heads, D width of a head.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` (..., C) -> x / rms(x) * weight, statistics in fp32 (Zhang and Sennrich 2019)."""
    x32 = x.to(torch.float32, copy=True)
    return weight * x32.mul_(_rstd(x32, eps)).to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of the norm's output (..., C) -> that of ``x`` (..., C). The weight is frozen."""
    x32 = x.to(torch.float32, copy=True)
    rstd = _rstd(x32, eps)
    normed = x32.mul_(rstd)  # fp32 (..., C)
    grad32 = (grad * weight).to(torch.float32)
    projection = (grad32 * normed).mean(-1, keepdim=True)
    return grad32.sub_(normed.mul_(projection)).mul_(rstd).to(grad.dtype)


def _rstd(x32: Tensor, eps: float) -> Tensor:
    """fp32 (..., 1): one over the root mean square."""
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)  # one pass; square and mean take two
    return torch.rsqrt(norm.square_().div_(x32.shape[-1]).add_(eps))


def swiglu(gate_up: Tensor) -> Tensor:
    """``gate_up`` (N, 2F), gate first -> silu(gate) * up (N, F) (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of the output (N, F) -> gradient of ``gate_up`` (N, 2F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, torch.nn.functional.silu(gate), out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return out


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding in place (Su et al. 2021, halves rotated against each other as
    transformers does).

    ``heads`` (N, H, D); ``cos`` and ``sin`` (N, D), each half the same. Passing ``-sin`` undoes the
    rotation, which is also its backward pass.
    """
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    old_first = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(old_first, sin)
    return heads
