"""Norm, SwiGLU and rotary embedding with their backward passes, as plain functions.

They save nothing themselves: whoever calls them keeps the inputs it wants to keep and recomputes
the rest. What they need beside their result is as large as a tile of rows, however many tokens.

Legend: N tokens, C width of the input, F width of the MLP, H heads, D width of a head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Of a tile of rows: 32 MiB in fp32, and on a GPU a kernel that still takes longer than its launch.
TILE_VALUES = 1 << 23


def row_tiles(x: Tensor) -> Iterator[slice]:
    """The rows of ``x`` (N, ...) in tiles of at most ``TILE_VALUES`` values, one row at least."""
    rows = max(1, TILE_VALUES * len(x) // max(1, x.numel()))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` (N, ..., C) -> x / rms(x) * weight, statistics in fp32 (Zhang and Sennrich 2019)."""
    out = x.new_empty(x.shape)
    for rows in row_tiles(x):
        x32 = x[rows].to(torch.float32, copy=True)
        torch.mul(weight, x32.mul_(_rstd(x32, eps)).to(x.dtype), out=out[rows])
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Gradient of the norm's output (N, ..., C) -> that of ``x`` (N, ..., C), in ``out`` where it
    is given, which may be ``grad``. The weight is frozen.
    """
    out = grad.new_empty(grad.shape) if out is None else out
    for rows in row_tiles(x):
        x32 = x[rows].to(torch.float32, copy=True)
        rstd = _rstd(x32, eps)
        normed = x32.mul_(rstd)  # fp32 (rows, ..., C)
        grad32 = (grad[rows] * weight).to(torch.float32)
        projection = (grad32 * normed).mean(-1, keepdim=True)
        torch.mul(grad32.sub_(normed.mul_(projection)), rstd, out=out[rows])
    return out


def _rstd(x32: Tensor, eps: float) -> Tensor:
    """fp32 (..., 1): one over the root mean square."""
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)  # one pass; square and mean take two
    return torch.rsqrt(norm.square_().div_(x32.shape[-1]).add_(eps))


def swiglu(gate_up: Tensor) -> Tensor:
    """``gate_up`` (N, 2F), gate first -> silu(gate) * up (N, F) (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of the output (N, F) -> gradient of ``gate_up`` (N, 2F), in ``out`` where it is
    given.
    """
    out = torch.empty_like(gate_up) if out is None else out
    for rows in row_tiles(gate_up):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        grad_gate, grad_up = out[rows].chunk(2, dim=-1)
        torch.mul(grad[rows], torch.nn.functional.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad[rows] * up, gate))
    return out


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding in place (Su et al. 2021, halves rotated against each other as
    transformers does).

    ``heads`` (N, H, D); ``cos`` and ``sin`` (N, D), each half the same. Passing ``-sin`` undoes the
    rotation, which is also its backward pass.
    """
    half = heads.shape[-1] // 2
    for rows in row_tiles(heads):
        first, second = heads[rows, :, :half], heads[rows, :, half:]
        row_cos, row_sin = cos[rows, None, :half], sin[rows, None, :half]
        old_first = first.clone()
        first.mul_(row_cos).addcmul_(second, row_sin, value=-1)
        second.mul_(row_cos).addcmul_(old_first, row_sin)
    return heads
