"""Layer inputs in host memory come back unchanged, in any order and from reused slots."""

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


def layer_inputs(slots: int, dtype: torch.dtype = torch.float32) -> HostLayerInputs:
    shape = (slots, ROWS, WIDTH)
    buffer = torch.zeros(layer_input_bytes(shape, dtype), dtype=torch.uint8)
    return HostLayerInputs(buffer, shape, dtype, tiny_store.CPU)


def test_bytes() -> None:
    assert layer_input_bytes((3, 5, 8), torch.bfloat16) == 240


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("late_streams")
def test_uneven_rows_come_back(dtype: torch.dtype) -> None:
    inputs = layer_inputs(5, dtype)
    given = [torch.randn(rows, WIDTH).to(dtype) for rows in (7, 1, 4, 0, 6)]
    handles = [inputs.save(hidden) for hidden in given]
    for hidden, handle in reversed(list(zip(given, handles, strict=True))):
        found = inputs.load(handle)
        assert found is not hidden
        assert found.dtype == dtype
        assert torch.equal(found, hidden)


@pytest.mark.usefixtures("late_streams")
def test_slots_are_used_again() -> None:
    """Many more layer inputs than slots, in a random order of saves, prefetches and loads."""
    chance, inputs = random.Random(0), layer_inputs(4)
    alive: list[tuple[Tensor, object]] = []
    loaded = 0
    for _ in range(300):
        if len(alive) < 4 and (not alive or chance.random() < 0.5):
            hidden = torch.randn(chance.randint(1, ROWS), WIDTH)
            alive.append((hidden, inputs.save(hidden)))
        elif chance.random() < 0.3:
            inputs.prefetch(chance.choice(alive)[1])
        else:
            expected, handle = alive.pop(chance.randrange(len(alive)))
            assert torch.equal(inputs.load(handle), expected)
            loaded += 1
    assert loaded > 80


@pytest.mark.usefixtures("late_streams")
def test_slots_that_were_discarded_and_resized_are_whole_again() -> None:
    """Copies out and back are under way as all is discarded; then the slots are halved."""
    rows = 8
    shape = (3, rows, WIDTH)
    buffer = torch.zeros(layer_input_bytes(shape, torch.float32), dtype=torch.uint8)
    streams = tiny_store.CountingSideStream(), tiny_store.CountingSideStream()
    inputs = HostLayerInputs(buffer, shape, torch.float32, tiny_store.CPU, *streams)
    for round_ in range(4):
        for number in range(3):
            handle = inputs.save(torch.full((rows, WIDTH), float(number)))
        if round_ % 2:
            inputs.prefetch(handle)
        inputs.discard()
        assert all(stream.ended == stream.started for stream in streams)
    assert all(stream.started for stream in streams)
    inputs.resize(2)
    given = [torch.randn(rows // 2, WIDTH) for _ in range(6)]
    handles = [inputs.save(hidden) for hidden in given]
    for hidden, handle in zip(given, handles, strict=True):
        assert torch.equal(inputs.load(handle), hidden)
    with pytest.raises(IndexError):
        [inputs.save(hidden) for hidden in (*given, given[0])]


def test_a_prefetch_brings_once() -> None:
    shape = (3, ROWS, WIDTH)
    back = tiny_store.CountingSideStream()
    buffer = torch.zeros(layer_input_bytes(shape, torch.float32), dtype=torch.uint8)
    inputs = HostLayerInputs(buffer, shape, torch.float32, tiny_store.CPU, back=back)
    handle = inputs.save(torch.ones(2, WIDTH))
    assert back.started == 0
    inputs.prefetch(handle)
    inputs.prefetch(handle)
    assert back.started == 1
    assert torch.equal(inputs.load(handle), torch.ones(2, WIDTH))
    assert back.started == 1


def test_a_few_copies_are_under_way_at_most() -> None:
    """The next one waits for the oldest: device memory of no more is held."""
    inputs = layer_inputs(6)
    for _ in range(6):
        inputs.save(torch.ones(ROWS, WIDTH))
        assert len(inputs._leaving) <= UNDER_WAY


def test_on_the_device_nothing_is_copied() -> None:
    inputs, hidden = DeviceLayerInputs(), torch.ones(2, WIDTH)
    handle = inputs.save(hidden)
    inputs.prefetch(handle)
    assert inputs.load(handle) is hidden
