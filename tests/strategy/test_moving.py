"""What one strategy has trained goes on under another one, on any number of ranks."""

import functools
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch
from ranks import run_ranks
from torch import Tensor

HOST = {"offload": True, "layer_inputs": "host", "embedding": "host", "lm_head": "host"}
SETTINGS: dict[str, dict[str, Any]] = {
    "replicate": {},
    "shard": {"strategy": "shard", "group": 2},
    "stream": {"strategy": "stream", "resident_layers": 1, **HOST},
    "pipeline": {"strategy": "pipeline"},
    "pipeline, host": {"strategy": "pipeline", **HOST},
}
STEPS = 2
State = dict[str, dict[str, Tensor]]  # "adapter", "optimizer"
Place = tuple[str, int]  # settings, ranks
SOURCES: list[Place] = [("shard", 2), ("pipeline", 2), ("stream", 2), ("replicate", 1)]
TARGETS: list[Place] = [
    ("replicate", 1),
    ("stream", 1),
    ("pipeline", 2),
    ("pipeline, host", 2),
    ("shard", 2),
]


def state_of(strategy: Any) -> State:
    return {
        "adapter": tiny_strategy.copied(strategy.adapter_state()),
        "optimizer": tiny_strategy.copied(strategy.optimizer_state()),
    }


def go_on(strategy: Any) -> dict[str, Any]:
    """The state now, the step that follows, and what it does to the adapters."""
    state = state_of(strategy)
    before = tiny_strategy.adapters(strategy)
    gradients: dict[str, Tensor] = {}

    def accept(loss: float, grad_norm: float) -> bool:
        gradients.update(tiny.gradients(strategy.decoder))
        return True

    stats = tiny_strategy.apply(strategy, STEPS, accept)
    after = tiny_strategy.adapters(strategy)
    update = {name: after[name] - before[name] for name in before}
    return {"state": state, "loss": stats.loss, "gradients": gradients, "update": update}


def build(settings: str) -> Any:
    spec = tiny_strategy.variant(**SETTINGS[settings])
    return tiny_strategy.build(spec, tiny_strategy.base())


def train(settings: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in settings:
        strategy = build(name)
        for step in range(STEPS):
            tiny_strategy.apply(strategy, step)
        found.append(go_on(strategy))
    return found


def take_over(settings: list[str], states: list[State]) -> list[dict[str, Any]]:
    found = []
    for name in settings:
        for state in states:
            strategy = build(name)
            strategy.load_adapter_state(tiny_strategy.copied(state["adapter"]))
            strategy.load_optimizer_state(tiny_strategy.copied(state["optimizer"]))
            found.append(go_on(strategy))
    return found


def run(function: Any, world_size: int, *args: Any) -> list[Any]:
    return [function(*args)] if world_size == 1 else run_ranks(function, world_size, *args)


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0's, with the gradients and updates of layers that only others have."""
    whole = {**ranks[0]}
    for key in ("gradients", "update"):
        whole[key] = dict(item for rank in ranks for item in rank[key].items())
    return whole


@functools.cache
def sources() -> dict[Place, dict[str, Any]]:
    found = {}
    for world_size in (1, 2):
        places = [place for place in SOURCES if place[1] == world_size]
        ranks = run(train, world_size, [name for name, _ in places])
        found |= {place: merged(list(each)) for place, *each in zip(places, *ranks, strict=True)}
    return found


@functools.cache
def moved() -> dict[tuple[Place, Place], dict[str, Any]]:
    """(from, to) -> how it went on."""
    found = {}
    states = [sources()[place]["state"] for place in SOURCES]
    for world_size in (1, 2):
        places = [place for place in TARGETS if place[1] == world_size]
        ranks = run(take_over, world_size, [name for name, _ in places], states)
        ways = [(source, target) for target in places for source in SOURCES]
        found |= {way: merged(list(each)) for way, *each in zip(ways, *ranks, strict=True)}
    return found


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_next_step_is_the_one_that_would_have_followed(source: Place, target: Place) -> None:
    expected, found = sources()[source], moved()[source, target]
    for part in ("adapter", "optimizer"):
        state, other = expected["state"][part], found["state"][part]
        assert state.keys() == other.keys()
        assert all(torch.equal(other[name], state[name]) for name in state), part
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert tiny.difference(found["gradients"], expected["gradients"]) <= 1e-5
    # AdamW divides by the root of the second moment: where that is tiny rounding weighs more.
    assert tiny.difference(found["update"], expected["update"]) <= 1e-3


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_state_is_whole(source: Place) -> None:
    state = sources()[source]["state"]
    layers = range(tiny_strategy.LAYERS)
    assert {name.split(".")[2] for name in state["adapter"]} == {str(layer) for layer in layers}
    parts = [f"{half}.{part}" for half in "ab" for part in ("step", "exp_avg", "exp_avg_sq")]
    assert state["optimizer"].keys() == {f"{layer}.{part}" for layer in layers for part in parts}
    assert all(float(state["optimizer"][f"{layer}.a.step"]) == STEPS for layer in layers)
