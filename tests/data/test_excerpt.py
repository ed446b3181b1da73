"""An excerpt holds exactly so many documents, of rows as an epoch draws them."""

import numpy as np
import pytest

from fttrain.data.excerpt import Excerpt

ROWS = [[([row, i], [row, i]) for i in range(1 + row % 3)] for row in range(12)]  # 24 documents


@pytest.mark.parametrize("documents", [1, 2, 7, 23, 24, 99])
def test_it_has_so_many_documents_and_each_at_most_once(documents: int) -> None:
    excerpt = Excerpt(ROWS, documents, seed=3)  # type: ignore[arg-type]
    flat = [tuple(ids) for row in range(len(excerpt)) for ids, _ in excerpt[row]]
    assert len(flat) == len(set(flat)) == excerpt.documents == min(documents, 24)
    assert all(excerpt[row] in ROWS for row in range(len(excerpt) - 1)), "whole rows but the last"


def test_rows_are_drawn_not_taken_from_the_start() -> None:
    order = [Excerpt(ROWS, 24, seed)[0][0][0][0] for seed in range(8)]  # type: ignore[arg-type]
    drawn = [int(np.random.RandomState(seed).permutation(12)[0]) for seed in range(8)]
    assert order == drawn
    assert len(set(order)) > 1
