"""Strategies on a GPU: copies and gathers beside the compute change nothing that is computed."""

from typing import Any

import pytest
import tiny
import tiny_store
import tiny_strategy
import torch
from torch import Tensor

from fttrain.dist import Group
from fttrain.store.host import HostStore
from fttrain.store.hostpool import HostPool, Memory
from fttrain.store.sharded import ShardedStore

pytestmark = pytest.mark.cuda
ON_HOST = {"embedding": "host", "head": "streamed", "boundaries": "host", "offload": True}
MIXED = ("recompute*2", "offload", "keep", "offload")
VARIANTS: dict[str, dict[str, Any]] = {
    "shard": {"strategy": "shard"},
    "stream": {"strategy": "stream"},
    "stream, some resident": {"strategy": "stream", "resident_layers": 2, "slots": 3},
    "stream, all on the host": {"strategy": "stream", **ON_HOST},
    "stream, all on the host, in groups": {"strategy": "stream", "group": 3, **ON_HOST},
    "replicate, kept": {"activations": "keep"},
    "activations offloaded": {"activations": "offload", "group": 1},
    "activations by layer": {"strategy": "stream", "activations": MIXED, **ON_HOST},
    "pipeline": {"strategy": "pipeline", **ON_HOST},
    "optimizer in parts": {"shard": True},
    "optimizer in parts, on the host": {"strategy": "stream", "shard": True, **ON_HOST},
    "head in 4 bits": {"strategy": "stream", "embedding": "host", "head": "nf4"},
    "MLP in tiles": {"mlp_tile_tokens": 1024},
}
LAYERS = 7
LAG_CYCLES = 2_000_000  # about a millisecond


def on_gpu() -> Group:
    return Group(0, 1, 0, torch.device("cuda", torch.cuda.current_device()))


def outcome(**settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of four steps, and the adapters that they led to."""
    frozen = tiny_strategy.base(dtype="bfloat16")
    recipe = tiny_strategy.variant(dtype="bfloat16", **settings)
    strategy = tiny_strategy.build(recipe, frozen, on_gpu())
    losses = [tiny_strategy.apply(strategy, step).loss for step in range(4)]
    answers = strategy.generate([[3, 4, 5], [6]], 4, set())
    assert [len(answer) for answer in answers] == [4, 4]
    return losses, {name: value.cpu() for name, value in tiny_strategy.adapters(strategy).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_strategy_trains_as_replicate_does(name: str) -> None:
    settings = VARIANTS[name]
    same_model = {"head": "nf4"} if settings.get("head") == "nf4" else {}  # it is another one
    expected_losses, expected = outcome(**same_model)
    losses, adapters = outcome(**settings)
    # Flash attention's backward adds in any order, so bits may differ.
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert tiny.difference(adapters, expected) < 1e-2


@pytest.mark.parametrize("kind", ["host", "sharded"])
def test_no_slot_is_overwritten_while_the_device_lags_behind(kind: str) -> None:
    group, flats = on_gpu(), tiny_store.flats(LAYERS)
    if kind == "host":
        pool = HostPool(group)
        pool.book("layers", LAYERS * tiny_store.LAYER_BYTES)
        on_host = pool.allocate("layers").view(LAYERS, -1)
        on_host.copy_(torch.stack(flats))
        layers = dict(enumerate(on_host))
        store: Any = HostStore(LAYERS, {}, layers, tiny_store.FORMAT, group.device)
    else:
        shards = [flat.to(group.device) for flat in flats]
        store = ShardedStore(shards, tiny_store.FORMAT, group)
    found: list[tuple[int, Tensor]] = []
    for order in tiny_store.walks(LAYERS, 12):
        for place, layer in enumerate(order):
            store.prefetch(order[place:])
            flat = store.get(layer).flat
            torch.cuda._sleep(LAG_CYCLES)  # the host runs ahead: copies are asked for meanwhile
            found.append((layer, flat.clone()))
            store.release(layer)
    for layer, flat in found:
        assert torch.equal(flat.cpu(), flats[layer])


def test_memory_that_cannot_be_page_locked_is_told_and_harms_no_kernel() -> None:
    pool = HostPool(on_gpu())
    pool.book("a", 1 << 20)
    buffer = pool.allocate("a")
    with pytest.warns(UserWarning, match=r"a: 0\.00 GiB could not be page-locked"):
        Memory(-1, 1 << 20).page_lock(buffer, "a", speak=False)  # for the second time
    assert float(torch.ones(3, device="cuda").add_(1).sum()) == 6


def test_memory_is_given_back_unlocked() -> None:
    pool = HostPool(on_gpu())
    pool.book("a", 1 << 20)
    for _ in range(50):  # where it stayed registered a second one at its address would be refused
        assert pool.allocate("a").is_pinned()
