"""Every strategy, schedule, placement and rank count trains the same model to the same bits.

On as many ranks a strategy of the data-parallel kind differs from replicate in nothing that is
computed, nor in the order of a sum; a pipeline computes what one rank would. Other rank counts sum
in another order. The cases are every strategy with every G and rank count, up to two ranks also
with every place of the layer inputs, and every pair of any two settings.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch
from ranks import run_ranks
from torch import Tensor

from fttrain.strategy.spec import StrategySpec

STEPS = 2
PROMPTS = [ids for ids, _ in tiny.documents((5, 1, 19, 9))]
NEW_TOKENS = 5
STORES: dict[str, dict[str, Any]] = {
    "replicate": {},
    "shard": {"strategy": "shard"},
    "stream": {"strategy": "stream"},
    "stream, some resident": {"strategy": "stream", "resident_layers": 2},
    "stream, 3 slots": {"strategy": "stream", "resident_layers": 1, "slots": 3},
    "stream, all resident": {"strategy": "stream", "resident_layers": "all"},
    "stream, by rank": {"strategy": "stream", "resident_layers": (3, 0, 1, 5)},
    "pipeline": {"strategy": "pipeline"},
}
MIXED = ("recompute*2", "offload", "keep", "offload")  # by layer
FACTORS: dict[str, tuple[Any, ...]] = {
    "world_size": (2, 4, 1),
    "store": tuple(STORES),
    "ends": tuple(itertools.product(("device", "host"), ("device", "host"))),
    "group": ("all", 1, 2),
    "saving": (
        ("recompute", "device"),
        ("recompute", "host"),
        ("keep", "device"),
        ("offload", "device"),
        (MIXED, "host"),
    ),
    "offload": (False, True),
    "model": ("llama", "llama_tied"),
    "dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class Case:
    """One setting of everything."""

    world_size: int = 1
    store: str = "replicate"
    ends: tuple[str, str] = ("device", "device")  # embedding, head
    group: int | str = "all"
    saving: tuple[Any, str] = ("recompute", "device")  # activations, layer_inputs
    offload: bool = False
    model: str = "llama"
    dtype: str = "float32"

    @property
    def legal(self) -> bool:
        """A pipeline has no groups."""
        return self.store != "pipeline" or self.group == "all"

    @property
    def pairs(self) -> set[Any]:
        return set(itertools.combinations([(name, getattr(self, name)) for name in FACTORS], 2))

    @property
    def cell(self) -> tuple[Any, ...]:
        """A place of the layer inputs concerns one rank, so two ranks are enough for each."""
        strategy = STORES[self.store].get("strategy", "replicate")
        place = self.saving[1] if self.world_size <= 2 else None
        return strategy, self.group, self.world_size, place

    @property
    def spec(self) -> StrategySpec:
        strategy = dict(STORES[self.store])
        if self.store == "stream, by rank":
            strategy["resident_layers"] = strategy["resident_layers"][: self.world_size]
        (embedding, head), (activations, layer_inputs) = self.ends, self.saving
        return tiny_strategy.variant(
            **strategy,
            group=self.group,
            offload=self.offload,
            dtype=self.dtype,
            embedding=embedding,
            lm_head=head,
            activations=activations,
            layer_inputs=layer_inputs,
        )


def reference(model: str, dtype: str, world_size: int) -> Case:
    return Case(world_size, model=model, dtype=dtype)


MODELS = list(itertools.product(FACTORS["model"], FACTORS["dtype"]))


@functools.cache
def cases() -> list[Case]:
    """Every cell and every pair of settings occurs, in greedily few cases."""
    everything = [Case(*values) for values in itertools.product(*FACTORS.values())]
    candidates = [(case, case.pairs | {case.cell}) for case in everything if case.legal]
    # A shared embedding that is also the head, on two stages: three settings that meet.
    chosen = [Case(2, "pipeline", ("host", "host"), model="llama_tied")]
    missing = set().union(*(wanted for _, wanted in candidates)) - chosen[0].pairs
    while missing:
        case, covered = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        chosen.append(case)
        missing -= covered
    return chosen


def outcome(case: Case) -> dict[str, Any]:
    """All that is compared, on this rank."""
    gradients: dict[str, Tensor] = {}

    def accept(loss: float, grad_norm: float) -> bool:
        if not gradients:
            gradients.update(tiny.gradients(strategy.decoder))
        return True

    try:
        frozen = tiny_strategy.base(case.model, case.dtype)
        strategy = tiny_strategy.build(case.spec, frozen)
        steps = [tiny_strategy.apply(strategy, step, accept) for step in range(STEPS)]
        return {
            "gradients": gradients,  # of the first step
            "figures": [(s.loss, s.grad_norm, s.targets, s.tokens, s.updated) for s in steps],
            "evaluated": tiny_strategy.evaluated(strategy),
            "answers": strategy.generate(PROMPTS, NEW_TOKENS, stop={2}),
            "adapters": tiny_strategy.adapters(strategy),
        }
    except Exception as error:
        raise RuntimeError(f"{case}") from error


def outcomes(wanted: list[Case]) -> list[dict[str, Any]]:
    return [outcome(case) for case in wanted]


@functools.cache
def found_on(world_size: int) -> list[dict[Case, dict[str, Any]]]:
    """Of each rank, what it found in each case on as many ranks."""
    wanted = [reference(*model, world_size) for model in MODELS]
    wanted += [case for case in cases() if case.world_size == world_size]
    ranks = [outcomes(wanted)] if world_size == 1 else run_ranks(outcomes, world_size, wanted)
    return [dict(zip(wanted, results, strict=True)) for results in ranks]


def whole(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What stages found, as one rank finds it."""
    merged = {**parts[0]}
    for key in ("gradients", "adapters"):
        merged[key] = dict(item for part in parts for item in part[key].items())
    return merged


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same_bits(one[n], other[n]) for n in other)
    if isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def test_every_cell_and_every_pair_of_settings_is_among_the_cases() -> None:
    ranks_and_places = 5  # 1 and 2 ranks with two places each, and 4 ranks
    strategies_and_groups = 3 * len(FACTORS["group"]) + 1  # a pipeline has no groups
    assert len({case.cell for case in cases()}) == strategies_and_groups * ranks_and_places
    seen = set().union(*(case.pairs for case in cases()))
    counts = {name: len(values) for name, values in FACTORS.items()}
    every = sum(a * b for a, b in itertools.combinations(counts.values(), 2))
    illegal = counts["group"] - 1  # a pipeline with groups
    assert len(seen) == every - illegal


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_case_gives_the_same_bits(world_size: int) -> None:
    ranks, differing = found_on(world_size), []
    for case in ranks[0]:
        found = [rank[case] for rank in ranks]
        if case.store == "pipeline":
            expected = found_on(1)[0][reference(case.model, case.dtype, 1)]
            found = [whole(found)] + [{**expected, **_shared(result)} for result in found]
        else:
            expected = ranks[0][reference(case.model, case.dtype, world_size)]
        differing += [
            (case, key)
            for result in found
            for key in expected
            if not same_bits(result[key], expected[key])
        ]
        assert any(expected["answers"])
        assert all(updated for *_, updated in expected["figures"])
    assert not differing


def _shared(result: dict[str, Any]) -> dict[str, Any]:
    """What every stage knows."""
    return {key: result[key] for key in ("figures", "evaluated", "answers")}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_other_rank_counts_differ_by_rounding(model: str, dtype: str, world_size: int) -> None:
    """Their sums over ranks have another order."""
    expected = found_on(1)[0][reference(model, dtype, 1)]
    for rank in found_on(world_size):
        found = rank[reference(model, dtype, world_size)]
        assert tiny.difference(found["gradients"], expected["gradients"]) <= 1e-5
        (loss, norm, *counts), (other_loss, other_norm, *other_counts) = (
            result["figures"][0] for result in (found, expected)
        )
        assert counts == other_counts
        assert loss == pytest.approx(other_loss, rel=1e-6)
        assert norm == pytest.approx(other_norm, rel=1e-5)
