"""Magnitudes train alike wherever layers, activations and optimizer state are."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import tiny_strategy
import torch
from ranks import run_ranks

from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.strategy.spec import StrategySpec

STEPS = 3
HOST = {"offload": True, "embedding": "host", "lm_head": "host"}
CASES: dict[str, dict[str, Any]] = {
    "replicate": {},
    "keep": {"activations": "keep", "group": 1},
    "offload": {"activations": "offload", "group": 1, **HOST},
    "shard": {"strategy": "shard", "layer_inputs": "host"},
    "stream": {"strategy": "stream", **HOST},
    "pipeline": {"strategy": "pipeline"},
    "in parts": {"shard": True},
    "in parts on the host": {"strategy": "stream", "shard": True, **HOST},
}


def spec(name: str) -> StrategySpec:
    made = tiny_strategy.variant(**CASES[name])
    optim = replace(made.optim, max_grad_norm=0.0)  # parts have a norm with another last bit
    return replace(made, lora=replace(made.lora, use_dora=True), optim=optim)


def train(name: str) -> Any:
    strategy = tiny_strategy.build(spec(name), tiny_strategy.base())
    figures = [tiny_strategy.apply(strategy, step) for step in range(STEPS)]
    return [stats.loss for stats in figures], tiny_strategy.copied(strategy.adapter_state())


def on_rank() -> dict[str, Any]:
    return {name: train(name) for name in CASES}


@functools.cache
def found() -> Any:
    return run_ranks(on_rank, 2)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("replicate", "pipeline")])
def test_every_place_gives_the_same_bits(name: str) -> None:
    for rank in found():
        assert rank[name][0] == rank["replicate"][0]
    state, expected = found()[0][name][1], found()[0]["replicate"][1]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert any(key.endswith("lora_magnitude_vector") for key in expected)


def test_a_pipeline_trains_what_one_rank_does() -> None:
    losses, state = train("replicate")
    for rank in found():
        assert rank["pipeline"][0] == losses
    assert all(torch.equal(found()[0]["pipeline"][1][key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["replicate", "shard", "stream"])
def test_the_start_is_the_frozen_model(name: str) -> None:
    """Magnitudes are the norms of the frozen rows, and no loss changes."""
    frozen, plain = tiny_strategy.base(), tiny_strategy.variant(**CASES[name])
    with_magnitudes, without = (tiny_strategy.start(each, frozen) for each in (spec(name), plain))
    batches = tiny_strategy.micro_batches(without)
    assert with_magnitudes.evaluate(batches) == without.evaluate(batches)
    state = with_magnitudes.adapter_state()
    for layer, flat in enumerate(frozen.flats):
        weight = FrozenLayer(flat, frozen.frozen_format).weight("down")
        magnitudes = state[f"model.layers.{layer}.mlp.down_proj.lora_magnitude_vector"]
        torch.testing.assert_close(magnitudes, weight.norm(dim=1))
