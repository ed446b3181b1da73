"""A checksum of a layer that the disk's, the host's and the card's copy can each be asked for.

word 0 * 1 + word 1 * 3 + word 2 * 5 + ... in wrapping 64-bit integers, over the bytes as
little-endian int64. All weights are odd, so any change of a single word changes the sum, and words
that change places change it too. It finds accidents; against intent the manifest has SHA-256.
"""

import torch
from torch import Tensor

from fttrain.util.units import MIB

PIECE_WORDS = 2 * MIB // 8  # few enough for the cache of a CPU; a product is as large as its piece

_weights: dict[torch.device, Tensor] = {}


@torch.no_grad()
def checksum(flat: Tensor) -> Tensor:
    """uint8 (n,) -> int64 () on the same device, without waiting for it. A last word that is not
    full counts as if zeros followed.
    """
    missing = -flat.numel() % 8
    if missing:  # only then: padding copies, and a layer is large
        flat = torch.nn.functional.pad(flat, (0, missing))
    words = flat.view(torch.int64)
    weights = _odd_numbers(flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, len(words), PIECE_WORDS):
        piece = words[begin : begin + PIECE_WORDS]
        # 2 (begin + i) + 1 = (2 i + 1) + 2 begin
        total += (piece * weights[: len(piece)]).sum() + piece.sum() * (2 * begin)
    return total


def _odd_numbers(device: torch.device) -> Tensor:
    """int64 (PIECE_WORDS,): 1, 3, 5, ..."""
    if device not in _weights:
        _weights[device] = torch.arange(PIECE_WORDS, dtype=torch.int64, device=device) * 2 + 1
    return _weights[device]
