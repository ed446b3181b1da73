"""Layers on their way in from the frozen base."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_strategy
import torch
from simulated_streams import simulated_streams
from stream_races import Race
from torch import Tensor

from fttrain.memory.ledger import MemoryLedger
from fttrain.store.loading import reserve_layers, to_device
from fttrain.store.side_stream import CudaSideStream


def test_parts_of_layers_arrive_in_order_with_progress() -> None:
    frozen = tiny_strategy.base()
    told = []
    size = frozen.frozen_format.layout.size_bytes // 4
    ledger = MemoryLedger(tiny_strategy.this_group())
    reserve_layers(ledger, 2, size)
    found = to_device(
        frozen, (3, 1), size, ledger, lambda *done: told.append(done), offset_bytes=size
    )
    assert told == [(1, 2), (2, 2)]
    for layer, flat in zip((3, 1), found, strict=True):
        assert torch.equal(flat, frozen.flats[layer][size : 2 * size])


class Card(str):
    """What torch takes for the CPU, and we for a card."""

    type = "cuda"


class Numbered:
    """A base whose layers consist of their number."""

    def read(self, layer: int, into: Tensor, offset_bytes: int) -> None:
        into.fill_(layer)


def filling_races() -> list[Race]:
    with simulated_streams() as simulation:
        staging = simulation.in_host_memory(torch.zeros(2 * 8, dtype=torch.uint8), "staging")
        ledger: Any = SimpleNamespace(device=Card("cpu"), allocate=lambda part: staging)
        found = to_device(Numbered(), range(5), 8, ledger, lambda *_: None)  # type: ignore[arg-type]
        assert [flat.tolist() for flat in found] == [[layer] * 8 for layer in range(5)]
    return simulation.races


def test_no_layer_is_read_over_one_that_is_being_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert filling_races() == []
    monkeypatch.setattr(CudaSideStream, "synchronize", lambda self: None)
    [race] = filling_races()
    assert race.is_like("staging", "copy_ in to_device reads *", "fill_ * writes it on host")
