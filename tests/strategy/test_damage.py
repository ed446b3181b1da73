"""A flipped bit in what a rank keeps of a layer stops all ranks before anything is updated."""

import functools
from typing import Any

import pytest
import tiny_strategy
import torch
from ranks import run_ranks

from fttrain.util.errors import UserError

# name -> (strategy, layer that is damaged on rank 1, ranks that see it)
KEPT: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "replicate": ({"strategy": "replicate"}, 3, [1]),
    "a shard": ({"strategy": "shard"}, 3, [0, 1]),
    "the host copy": ({"strategy": "stream", "offload": True}, 3, [0, 1]),
    "a resident layer": ({"strategy": "stream", "resident_layers": 2}, 3, [1]),
    "a stage": ({"strategy": "pipeline"}, 4, [1]),
}
EVERY = 3


def damaged(name: str, clean_steps: int) -> Any:
    """A strategy after so many steps, then with a bit of rank 1's bytes flipped."""
    settings, layer, _ = KEPT[name]
    frozen = tiny_strategy.base()
    spec = tiny_strategy.variant(**settings, verify_every=EVERY)
    strategy = tiny_strategy.build(spec, frozen)
    for step in range(clean_steps):
        tiny_strategy.apply(strategy, step)
    group = tiny_strategy.this_group()
    group.barrier()
    if group.rank == 1:
        frozen.read_into[layer][777] ^= 16
    group.barrier()
    return strategy


def train(name: str) -> dict[str, Any]:
    """Steps until one is refused."""
    strategy = damaged(name, clean_steps=1)
    for step in range(1, 1 + EVERY):
        before = tiny_strategy.adapters(strategy)
        try:
            tiny_strategy.apply(strategy, step)
        except UserError as error:
            after = tiny_strategy.adapters(strategy)
            same = all(torch.equal(after[key], before[key]) for key in before)
            first = strategy.decoder.layers[0].index
            return {"error": str(error), "step": step, "unchanged": same, "first": first}
    raise AssertionError(f"{name}: nobody saw it")


def first_use(name: str, use: str) -> str:
    """What is said of damage that was there before anything ran."""
    strategy = damaged(name, clean_steps=0)
    try:
        if use == "evaluate":
            strategy.evaluate(tiny_strategy.micro_batches(strategy))
        else:
            strategy.generate([[5, 6, 7]], 2, set())
    except UserError as error:
        return str(error)
    raise AssertionError(f"{name}: nobody saw it")


def on_rank() -> dict[str, Any]:
    return {
        name: (train(name), [first_use(name, use) for use in ("evaluate", "generate")])
        for name in KEPT
    }


@functools.cache
def found() -> list[dict[str, Any]]:
    return run_ranks(on_rank, 2)


@pytest.mark.parametrize("name", KEPT)
def test_the_next_check_of_the_layer_stops_every_rank(name: str) -> None:
    _, layer, ranks = KEPT[name]
    place = layer - found()[1][name][0]["first"]  # among the layers of the rank that has it
    due = next(step for step in range(1, 1 + EVERY) if (place + step) % EVERY == 0)
    for rank in found():
        training, uses = rank[name]
        assert training["step"] == due
        assert training["unchanged"]
        for error in (training["error"], *uses):
            assert f"layer {layer} on rank {ranks[0]}: its bytes on cpu are not those" in error
            assert str(tiny_strategy.base().path(layer)) in error
