"""A hundred steps in which every copy and gather is late by a random time: the same bits."""

import random
import time
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_store
import tiny_strategy
import torch
from ranks import run_ranks
from torch import Tensor

from fttrain.data.batch import collate
from fttrain.model.config import LoraConfig
from fttrain.strategy.optimizer_step import HostUpdate
from fttrain.strategy.spec import StrategySpec

STEPS = 100
SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EVERYTHING_MOVES = {"layer_inputs": "host", "lm_head": "host", "offload": True}
MIXED = ("offload*2", "recompute", "offload")  # activations by layer
SPECS = {
    "replicate": tiny_strategy.variant(),
    "shard": tiny_strategy.variant("shard", **EVERYTHING_MOVES),
    "stream": tiny_strategy.variant("stream", **EVERYTHING_MOVES),
    "optimizer in parts": tiny_strategy.variant("shard", shard=True, **EVERYTHING_MOVES),
    "activations move": tiny_strategy.variant(activations=MIXED, group=1, **EVERYTHING_MOVES),
}


def train(spec: StrategySpec) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """Adapters after all steps, and the figures of each."""
    spec = replace(spec, quant=tiny.PLAIN, lora=LoraConfig(r=2))
    strategy = tiny_strategy.build(spec, tiny_strategy.base(quant=tiny.PLAIN, **SHAPE))
    rank, world_size = strategy.data_parallel
    figures = []
    for step in range(STEPS):
        batches = [
            collate(tiny.documents((9, 3 + index), seed=index), index)
            for index in range(rank, 4, world_size)
        ]
        stats = strategy.train_step(batches, step, 1e-2, lambda loss, norm: True)
        figures.append((stats.loss, stats.grad_norm))
    return tiny_strategy.adapters(strategy), figures


def delay_updates(seed: int, most_s: float = 3e-3) -> None:
    """From now on the host's update of each layer begins late, by a random time."""
    chance, update = random.Random(seed), HostUpdate._update

    def late(self: HostUpdate, *arguments: Any) -> Any:
        time.sleep(most_s * chance.random())
        return update(self, *arguments)

    HostUpdate._update = late  # type: ignore[method-assign]


def on_rank() -> dict[str, tuple[dict[str, Tensor], list[tuple[float, float]]]]:
    # The norm of parts has another last bit: late ones are compared with themselves.
    found = {name: train(SPECS[name]) for name in ("replicate", "optimizer in parts")}
    tiny_store.delay_streams(seed=torch.distributed.get_rank())
    delay_updates(seed=torch.distributed.get_rank())
    return found | {f"late {name}": train(spec) for name, spec in SPECS.items()}


@pytest.mark.slow
def test_late_streams_change_nothing() -> None:
    for found in run_ranks(on_rank, 2):
        _, figures = found["replicate"]
        assert figures[-1][0] < figures[0][0] - 0.1  # it has learnt something all the while
        for name in SPECS:
            expected = found["optimizer in parts" if "parts" in name else "replicate"]
            other, late_figures = found[f"late {name}"]
            assert late_figures == expected[1], name
            assert all(torch.equal(other[key], own) for key, own in expected[0].items()), name
