"""Norm, SwiGLU and rotary embedding with their backward passes, as plain functions.

They save nothing: the caller saves inputs and computes the rest again. Beside their result they
allocate a tile of rows, however many tokens there are. Plain torch defines the result; on a GPU
Liger's kernels compute the same where they can (``liger.py``).

Legend: N tokens, C width of the input, F width of the MLP, H heads, D width of a head. Tensors are
in the compute dtype where no other stands beside them.
"""

import torch
from torch import Tensor

from fttrain.model import liger
from fttrain.model.rows import inverse_rms, row_tiles


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of ``x`` (N, ..., C): x / rms(x) * weight, ``weight`` (C,), statistics in fp32
    (Zhang and Sennrich 2019).
    """
    if liger.takes(x, x.shape[-1]):
        return liger.rms_norm(x, weight, eps)
    out = x.new_empty(x.shape)
    for rows in row_tiles(x):
        x32 = x[rows].to(torch.float32, copy=True)  # fp32 (rows, ..., C)
        torch.mul(weight, x32.mul_(inverse_rms(x32, eps)).to(x.dtype), out=out[rows])
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Gradient of ``x`` (N, ..., C) from ``grad`` (N, ..., C) of the norm's output. The weight is
    frozen. The result is in ``out`` where given, which may be ``grad``.
    """
    if liger.takes(x, x.shape[-1]):
        return liger.rms_norm_backward(grad, x, weight, eps, out)
    out = grad.new_empty(grad.shape) if out is None else out
    for rows in row_tiles(x):
        x32 = x[rows].to(torch.float32, copy=True)
        rstd = inverse_rms(x32, eps)  # fp32 (rows, ..., 1)
        normed = x32.mul_(rstd)  # fp32 (rows, ..., C)
        grad32 = (grad[rows] * weight).to(torch.float32)
        projection = (grad32 * normed).mean(-1, keepdim=True)
        torch.mul(grad32.sub_(normed.mul_(projection)), rstd, out=out[rows])
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU: silu(gate) * up (N, F) of ``gate_up`` (N, 2F), gate first (Shazeer 2020)."""
    if liger.takes(gate_up, gate_up.shape[-1] // 2):
        return liger.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of ``gate_up`` (N, 2F) from ``grad`` (N, F) of the output, in ``out`` where
    given.
    """
    if liger.takes(gate_up, grad.shape[-1]) and gate_up.is_contiguous():
        return liger.swiglu_backward(grad, gate_up, out)
    out = torch.empty_like(gate_up) if out is None else out
    for rows in row_tiles(gate_up):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        grad_gate, grad_up = out[rows].chunk(2, dim=-1)
        torch.mul(grad[rows], torch.nn.functional.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad[rows] * up, gate))
    return out


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding in place (Su et al. 2021; as in transformers the two halves of a head
    are rotated against each other).

    ``heads`` (N, H, D); ``cos`` and ``sin`` (N, D), both halves the same. ``-sin`` undoes the
    rotation, which is also its backward.
    """
    if liger.takes(heads, heads.shape[-1]) and heads.is_contiguous() and heads.shape[1] > 1:
        return liger.rotate_(heads, cos, sin)
    half = heads.shape[-1] // 2
    for rows in row_tiles(heads):
        first, second = heads[rows, :, :half], heads[rows, :, half:]
        row_cos, row_sin = cos[rows, None, :half], sin[rows, None, :half]
        old_first = first.clone()
        first.mul_(row_cos).addcmul_(second, row_sin, value=-1)
        second.mul_(row_cos).addcmul_(old_first, row_sin)
    return heads
