"""Layers of a pipeline's stages against every possible division."""

import itertools
import random

import pytest

from fttrain.strategy.balance import ROOMY, balance
from fttrain.util.errors import UserError
from fttrain.util.units import GIB


def fullest(
    counts: tuple[int, ...], layer_bytes: list[int], fixed_bytes: list[int], free_bytes: list[int]
) -> float:
    return max(
        (fixed + count * layer) / free
        for count, layer, fixed, free in zip(
            counts, layer_bytes, fixed_bytes, free_bytes, strict=True
        )
    )


@pytest.mark.parametrize("seed", range(90))
def test_no_division_is_less_full_and_where_there_is_room_none_is_more_even(seed: int) -> None:
    chance = random.Random(seed)
    layers, stages = chance.randint(4, 9), chance.randint(1, 4)
    layer_bytes, fixed_bytes, free_bytes = (
        [chance.randint(low, high) for _ in range(stages)]
        for low, high in ((5, 20), (0, 60), (90, 180))
    )
    # division -> how full it makes the fullest stage
    fills = {
        counts: max(ROOMY, fullest(counts, layer_bytes, fixed_bytes, free_bytes))
        for counts in itertools.product(range(1, layers + 1), repeat=stages)
        if sum(counts) == layers
    }
    least = min(fills.values())
    if least > 1:
        with pytest.raises(UserError, match=r"strategy=pipeline: stage \d would need"):
            balance(layers, layer_bytes, fixed_bytes, free_bytes)
        return
    parts = balance(layers, layer_bytes, fixed_bytes, free_bytes)
    assert [layer for part in parts for layer in part] == list(range(layers))
    found = tuple(len(part) for part in parts)
    assert fills[found] == least
    if least == ROOMY:
        assert max(found) == min(max(counts) for counts, fill in fills.items() if fill == ROOMY)


def test_equal_stages_get_as_many() -> None:
    assert balance(8, [1] * 4, [0] * 4, [100] * 4) == [
        range(0, 2),
        range(2, 4),
        range(4, 6),
        range(6, 8),
    ]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"pipeline on 4 ranks: the model has 3 layers"):
        balance(3, [1] * 4, [0] * 4, [9] * 4)


def test_a_stage_that_is_too_small_is_named_with_figures() -> None:
    message = (
        r"stage 1 would need 3\.00 GiB for 1 of 4 layers, 2\.00 GiB are free there; embedding=host"
    )
    with pytest.raises(UserError, match=message):
        balance(4, [GIB] * 2, [0, 2 * GIB], [9 * GIB, 2 * GIB])


@pytest.mark.parametrize("free_bytes", [0, -GIB])
def test_a_full_device_is_refused(free_bytes: int) -> None:
    """What an allocator holds beyond its cap counts below zero."""
    with pytest.raises(UserError, match=r"stage 1 would need 1\.00 GiB for 1 of 4 layers"):
        balance(4, [GIB] * 2, [0, 0], [9 * GIB, free_bytes])
