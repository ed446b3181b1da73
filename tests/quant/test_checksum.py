"""The checksum against numpy's wrapping integers, and what it finds."""

import numpy as np
import pytest
import torch

from fttrain.quant.checksum import PIECE_WORDS, checksum


@pytest.mark.parametrize("size", [0, 8, 840 * 256, PIECE_WORDS * 8, PIECE_WORDS * 20 + 24])
def test_it_is_the_weighted_sum_of_the_words(size: int) -> None:
    flat = torch.randint(0, 256, (size,), dtype=torch.uint8)
    words = flat.numpy().view(np.int64)
    odd = 2 * np.arange(len(words), dtype=np.int64) + 1
    assert int(checksum(flat)) == int((words * odd).sum())


def test_a_last_word_that_is_not_full_ends_in_zeros() -> None:
    flat = torch.arange(13, dtype=torch.uint8)
    assert int(checksum(flat)) == int(checksum(torch.nn.functional.pad(flat, (0, 3))))


def test_flips_and_exchanged_words_show() -> None:
    flat = torch.randint(0, 256, (PIECE_WORDS * 12,), dtype=torch.uint8)
    right = int(checksum(flat))
    for byte in (0, 7, PIECE_WORDS * 8 - 1, PIECE_WORDS * 8, len(flat) - 1):
        for bit in (1, 128):
            flipped = flat.clone()
            flipped[byte] ^= bit
            assert int(checksum(flipped)) != right
    words = flat.clone().view(torch.int64)
    words[[5, PIECE_WORDS + 5]] = words[[PIECE_WORDS + 5, 5]]
    assert int(checksum(words.view(torch.uint8))) != right
