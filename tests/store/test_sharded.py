"""Shards: every rank gets every layer whole, whatever the order of passes."""

import pytest
import tiny_store
import tiny_strategy
import torch
from ranks import run_ranks

from fttrain.store import Traffic
from fttrain.store.sharded import SLOTS, ShardedStore, shard_bytes
from fttrain.util.errors import UserError

LAYERS = 5
ORDERS = [*tiny_store.passes_up_and_down(LAYERS, 12), [3, 1], [3, 1], [2]]


def read_all() -> tuple[list[bool], list[Traffic], int]:
    """Whether each layer came as it is; traffic; length."""
    group = tiny_strategy.this_group()
    flats = tiny_store.flats(LAYERS)
    shards = [flat.view(group.world_size, -1)[group.rank].clone() for flat in flats]
    tiny_store.delay_streams(seed=group.rank)
    store = ShardedStore(shards, tiny_store.FORMAT, group)
    given = tiny_store.read(store, ORDERS)
    traffic = [tiny_store.steady(store), store.take_traffic()]
    return [torch.equal(flat, flats[layer]) for layer, flat in given], traffic, len(store)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layer_comes_whole(world_size: int) -> None:
    for good, (traffic, none), length in run_ranks(read_all, world_size):
        assert all(good)
        assert len(good) == sum(len(order) for order in ORDERS)
        assert length == LAYERS
        received = tiny_store.LAYER_BYTES * (world_size - 1) // world_size
        assert traffic.gather_bytes == 2 * (LAYERS - SLOTS) * received
        assert traffic.h2d_bytes == none.gather_bytes == none.wait_s == 0


def test_a_share_of_the_bytes_on_each_of_up_to_eight_ranks() -> None:
    for world_size in range(1, 9):
        assert shard_bytes(tiny_store.LAYER_BYTES, world_size) * world_size == (
            tiny_store.LAYER_BYTES
        )
    with pytest.raises(UserError, match=r"strategy=shard: .* do not divide among 9 ranks"):
        shard_bytes(tiny_store.LAYER_BYTES, 9)
