"""Layers on their way in from the frozen base."""

import tiny_strategy
import torch

from fttrain.store.filling import book_layers, to_device
from fttrain.store.hostpool import HostPool


def test_parts_of_layers_arrive_in_order_with_progress() -> None:
    frozen = tiny_strategy.base()
    told = []
    size = frozen.frozen_format.layout.size_bytes // 4
    pool = HostPool(tiny_strategy.this_group())
    book_layers(pool, 2, size)
    found = to_device(
        frozen, (3, 1), size, pool, lambda *done: told.append(done), offset_bytes=size
    )
    assert told == [(1, 2), (2, 2)]
    for layer, flat in zip((3, 1), found, strict=True):
        assert torch.equal(flat, frozen.flats[layer][size : 2 * size])
