from itertools import pairwise

import numpy as np
import pytest

from fttrain.data.pack import one_per_row, pack


def rows_of(lengths: list[int], seq_len: int) -> list[list[int]]:
    order, offsets = pack(np.array(lengths, dtype=np.int64), seq_len)
    return [order[a:b].tolist() for a, b in pairwise(offsets)]


def best_fit_decreasing(lengths: list[int], seq_len: int) -> int:
    """The textbook version: number of rows."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(seq_len - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_every_document_once_and_as_few_rows_as_best_fit(seed: int) -> None:
    random = np.random.RandomState(seed)
    seq_len = int(random.randint(1, 200))
    lengths = random.randint(1, seq_len + 1, size=random.randint(0, 300)).tolist()
    rows = rows_of(lengths, seq_len)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in row) <= seq_len for row in rows)
    assert len(rows) == best_fit_decreasing(lengths, seq_len)
    assert rows == rows_of(lengths, seq_len) == sorted(sorted(row) for row in rows)


def test_fills_a_row_to_the_last_token() -> None:
    assert rows_of([6, 3, 1, 5, 5], 10) == [[0, 1, 2], [3, 4]]
    assert rows_of([10, 10], 10) == [[0], [1]]
    assert rows_of([], 10) == []


def test_refuses_what_does_not_fit() -> None:
    for lengths in ([11], [0]):
        with pytest.raises(ValueError, match="must be in"):
            rows_of(lengths, 10)


def test_one_per_row() -> None:
    order, offsets = one_per_row(np.array([3, 9]))
    assert (order.tolist(), offsets.tolist()) == ([0, 1], [0, 1, 2])
