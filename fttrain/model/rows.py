"""Rows of a tensor: tiles of them, and their inverse root mean square."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Values of a tile of rows: 32 MiB in fp32, and on a GPU a kernel that takes longer than its launch.
TILE_VALUES = 1 << 23


def row_tiles(x: Tensor) -> Iterator[slice]:
    """The rows of ``x`` (N, ...) in tiles of at most ``TILE_VALUES`` values, one row at least."""
    rows = max(1, TILE_VALUES * len(x) // max(1, x.numel()))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of each row of ``x`` (..., C): fp32 (..., 1). No fp32 copy of
    ``x`` is made.
    """
    # One pass over x; square and mean take two.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
