"""Rows of a tensor: tiles of them, and what a norm divides each by."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Of a tile of rows: 32 MiB in fp32, and on a GPU a kernel that still takes longer than its launch.
TILE_VALUES = 1 << 23


def row_tiles(x: Tensor) -> Iterator[slice]:
    """The rows of ``x`` (N, ...) in tiles of at most ``TILE_VALUES`` values, one row at least."""
    rows = max(1, TILE_VALUES * len(x) // max(1, x.numel()))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """fp32 (..., 1): one over the root mean square of each row of ``x`` (..., C), which is read as
    it is: nothing of its size is made in fp32.
    """
    # One pass; square and mean take two.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
