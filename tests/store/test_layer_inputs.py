"""Boundaries in host memory come back as they went, in any order and from reused places."""

import random

import pytest
import tiny_store
import torch
from torch import Tensor

from fttrain.store.layer_inputs import (
    UNDER_WAY,
    DeviceLayerInputs,
    HostLayerInputs,
    layer_input_bytes,
)

ROWS, WIDTH = 7, 4


def boundaries(places: int, dtype: torch.dtype = torch.float32) -> HostLayerInputs:
    shape = (places, ROWS, WIDTH)
    buffer = torch.zeros(layer_input_bytes(shape, dtype), dtype=torch.uint8)
    return HostLayerInputs(buffer, shape, dtype, tiny_store.CPU)


def test_bytes() -> None:
    assert layer_input_bytes((3, 5, 8), torch.bfloat16) == 240


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("late_lanes")
def test_uneven_rows_come_back(dtype: torch.dtype) -> None:
    kept = boundaries(5, dtype)
    given = [torch.randn(rows, WIDTH).to(dtype) for rows in (7, 1, 4, 0, 6)]
    handles = [kept.save(boundary) for boundary in given]
    for boundary, handle in reversed(list(zip(given, handles, strict=True))):
        found = kept.load(handle)
        assert found is not boundary
        assert found.dtype == dtype
        assert torch.equal(found, boundary)


@pytest.mark.usefixtures("late_lanes")
def test_places_are_used_again() -> None:
    """Many more boundaries than places, in a random order of saves, prefetches and loads."""
    chance, kept = random.Random(0), boundaries(4)
    alive: list[tuple[Tensor, object]] = []
    loaded = 0
    for _ in range(300):
        if len(alive) < 4 and (not alive or chance.random() < 0.5):
            boundary = torch.randn(chance.randint(1, ROWS), WIDTH)
            alive.append((boundary, kept.save(boundary)))
        elif chance.random() < 0.3:
            kept.prefetch(chance.choice(alive)[1])
        else:
            expected, handle = alive.pop(chance.randrange(len(alive)))
            assert torch.equal(kept.load(handle), expected)
            loaded += 1
    assert loaded > 80


@pytest.mark.usefixtures("late_lanes")
def test_places_that_were_forgotten_and_divided_are_whole_again() -> None:
    """Copies out and back are under way as all is forgotten; then there are halves, two times as
    many.
    """
    rows = 8
    shape = (3, rows, WIDTH)
    buffer = torch.zeros(layer_input_bytes(shape, torch.float32), dtype=torch.uint8)
    streams = tiny_store.CountingLane(), tiny_store.CountingLane()
    kept = HostLayerInputs(buffer, shape, torch.float32, tiny_store.CPU, *streams)
    for attempt in range(4):
        for number in range(3):
            handle = kept.save(torch.full((rows, WIDTH), float(number)))
        if attempt % 2:
            kept.prefetch(handle)
        kept.discard()
        assert all(stream.ended == stream.started for stream in streams)
    assert all(stream.started for stream in streams)
    kept.divide(2)
    given = [torch.randn(rows // 2, WIDTH) for _ in range(6)]
    handles = [kept.save(boundary) for boundary in given]
    for boundary, handle in zip(given, handles, strict=True):
        assert torch.equal(kept.load(handle), boundary)
    with pytest.raises(IndexError):
        [kept.save(boundary) for boundary in (*given, given[0])]


def test_a_prefetch_brings_once() -> None:
    shape = (3, ROWS, WIDTH)
    back = tiny_store.CountingLane()
    buffer = torch.zeros(layer_input_bytes(shape, torch.float32), dtype=torch.uint8)
    kept = HostLayerInputs(buffer, shape, torch.float32, tiny_store.CPU, back=back)
    handle = kept.save(torch.ones(2, WIDTH))
    assert back.started == 0
    kept.prefetch(handle)
    kept.prefetch(handle)
    assert back.started == 1
    assert torch.equal(kept.load(handle), torch.ones(2, WIDTH))
    assert back.started == 1


def test_a_few_copies_are_under_way_at_most() -> None:
    """The next one waits for the oldest: device memory of no more is held."""
    kept = boundaries(6)
    for _ in range(6):
        kept.save(torch.ones(ROWS, WIDTH))
        assert len(kept._leaving) <= UNDER_WAY


def test_on_the_device_nothing_is_copied() -> None:
    kept, boundary = DeviceLayerInputs(), torch.ones(2, WIDTH)
    handle = kept.save(boundary)
    kept.prefetch(handle)
    assert kept.load(handle) is boundary
