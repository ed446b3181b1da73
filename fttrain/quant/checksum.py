"""A checksum of a layer, computed alike from its copy on the disk, the host or the card.

word 0 * 1 + word 1 * 3 + word 2 * 5 + ... in wrapping 64-bit integers, over the bytes as
little-endian int64. All weights are odd, so any change of a single word changes the sum, and so
do most exchanges of two words. It finds accidents; against intent the manifest has SHA-256.
"""

import torch
from torch import Tensor

from fttrain.util.units import MIB

PIECE_WORDS = 2 * MIB // 8  # a piece and its product of equal size fit the cache of a CPU

_weights: dict[torch.device, Tensor] = {}


@torch.no_grad()
def checksum(flat: Tensor) -> Tensor:
    """Return the checksum of ``flat`` uint8 (n,): int64 (), on the same device.

    The host does not wait for it. A last word that is not full is padded with zeros.
    """
    missing = -flat.numel() % 8
    if missing:  # padding copies the whole layer
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
