"""Memory runs out in a step: all ranks learn it, and take it again with smaller micro-batches.

Two times in a run, for the second time with micro-batches that are halves already. What comes is,
bit for bit, what a run does that has begun with smaller ones: nothing of a step that was not
finished is left, and no place that it had taken is lost.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import short_memory
import tiny
import tiny_strategy
import torch
from ranks import run_ranks

from fttrain.data.loader import Loader
from fttrain.schedule.step_runner import StepRunner
from fttrain.strategy.protocol import OutOfMemory, StepStats
from fttrain.strategy.spec import StepSize, StrategySpec
from fttrain.training.evaluation import HoldOut

SEQ_LEN, ROWS, ROWS_PER_STEP = 40, 24, 8
ROOM = {0: 128, 2: 64}  # step -> tokens for which there is memory from then on: 2 rows, 1 row
STEPS = 3
MIXED = ("recompute*2", "offload", "keep", "offload")  # by layer
HOST = {"layer_inputs": "host", "embedding": "host", "lm_head": "host", "offload": True}


@dataclass(frozen=True)
class Case:
    """Where memory runs out under which settings."""

    settings: dict[str, Any]
    place: str
    ranks: tuple[int, ...] = (1,)  # on which it runs out
    layer: int = 2

    @property
    def spec(self) -> StrategySpec:
        return tiny_strategy.variant(**self.settings)


CASES = [
    Case({}, "embed", (0,)),
    Case({"activations": "keep", "group": 1}, "backward"),
    Case({"strategy": "shard", "layer_inputs": "host"}, "recompute", (0, 1)),
    Case({"strategy": "shard", "activations": "offload"}, "forward"),
    Case({"strategy": "stream", "activations": MIXED, "group": 2, **HOST}, "backward", (0,)),
    Case({"strategy": "stream", "resident_layers": 2, **HOST}, "head"),
    Case({"strategy": "stream", "shard": True, **HOST}, "backward"),
    Case({"strategy": "pipeline", "layer_inputs": "host"}, "forward", (0,), layer=1),
    Case({"strategy": "pipeline", "activations": "keep"}, "head"),
    Case({"strategy": "pipeline", "activations": MIXED, **HOST}, "backward", layer=4),
    Case({"strategy": "pipeline", "activations": "offload"}, "receive", (0,)),
]


def prepared(spec: StrategySpec, size: int) -> tuple[Any, Loader]:
    """A strategy for micro-batches of ``size`` rows, and what feeds it."""
    group = tiny_strategy.this_group()
    accumulation = ROWS_PER_STEP // size // group.world_size
    spec = replace(spec, size=StepSize(size, SEQ_LEN, accumulation))
    strategy = tiny_strategy.build(spec, tiny_strategy.base())
    lengths = [33 + row % 8 for row in range(ROWS)]
    rows: Any = [[document] for document in tiny.documents(lengths, masked=0.3)]
    place, places = strategy.data_parallel
    loader = Loader(rows, size, accumulation * group.world_size // places, place, places, seed=3)
    return strategy, loader


def divide(strategy: Any, loader: Loader) -> None:
    strategy.resize(2)
    loader.divide(2)


def take(strategy: Any, loader: Loader, step: int) -> StepStats:
    loader.position = step
    stats: StepStats = strategy.train_step(
        loader.next_step(), step, tiny_strategy.LR, lambda loss, norm: True
    )
    return stats


def short(case: Case) -> dict[str, Any]:
    """A run with micro-batches of 4 rows, for which there is no memory."""
    strategy, loader = prepared(case.spec, 4)
    here = tiny_strategy.this_group().rank in case.ranks
    steps, said = [], []
    for step in range(STEPS):
        with pytest.MonkeyPatch.context() as patch:
            if here:
                tokens = min(room for since, room in ROOM.items() if since <= step)
                if case.place != "receive" or step in ROOM:
                    short_memory.limit(patch, case.place, tokens, case.layer)
            try:
                steps.append(take(strategy, loader, step))
            except OutOfMemory as error:
                said.append(error.what)
                divide(strategy, loader)
                steps.append(take(strategy, loader, step))
    return {**left(strategy, steps), "said": said}


def enough(case: Case) -> dict[str, Any]:
    """The same from the start with 2 rows, and from step 2 on with 1."""
    strategy, loader = prepared(case.spec, 2)
    steps = []
    for step in range(STEPS):
        if step == 2:
            divide(strategy, loader)
        steps.append(take(strategy, loader, step))
    return left(strategy, steps)


def left(strategy: Any, steps: list[StepStats]) -> dict[str, Any]:
    return {
        "adapters": tiny_strategy.adapters(strategy),
        "gradients": tiny.gradients(strategy.decoder),  # of the last step, as it was applied
        "figures": [(s.loss, s.grad_norm, s.targets, s.tokens, s.updated) for s in steps],
        # But the first: layers that lie in the slots after an attempt do not move again.
        "moved": [replace(step.traffic, wait_s=0.0) for step in steps[1:]],
    }


def both(cases: list[Case]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(short(case), enough(case)) for case in cases]


@functools.cache
def found() -> list[list[tuple[dict[str, Any], dict[str, Any]]]]:
    return run_ranks(both, 2, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_the_step_is_taken_again_as_if_it_had_begun_with_smaller_ones(number: int) -> None:
    case = CASES[number]
    for ours, expected in (rank[number] for rank in found()):
        first = f"rank {case.ranks[0]} ran out of memory on cpu (tried to allocate"
        assert len(ours["said"]) == len(ROOM)
        assert all(said.startswith(first) for said in ours["said"])
        assert all("the largest parts: " in said for said in ours["said"])
        assert ours["figures"] == expected["figures"]
        assert ours["moved"] == expected["moved"]
        assert all(updated for *_, updated in ours["figures"])
        for part in ("adapters", "gradients"):
            assert all(torch.equal(ours[part][n], expected[part][n]) for n in expected[part])


EVALUATIONS = [
    Case({}, "embed", (0,)),
    Case({"strategy": "shard"}, "forward", (0, 1)),
    Case({"strategy": "stream", **HOST}, "loss"),
    Case({"strategy": "pipeline"}, "forward", (0,), layer=1),
    Case({"strategy": "pipeline", **HOST}, "loss"),
    Case({"strategy": "pipeline"}, "receive"),
]


def evaluations(cases: list[Case]) -> list[dict[str, Any]]:
    """Held-out rows in micro-batches of 4, for which there is no memory, and of 2; then a step."""
    found = []
    for case in cases:
        strategy, loader = prepared(case.spec, 4)
        rows = loader._rows
        here, said = tiny_strategy.this_group().rank in case.ranks, []
        with pytest.MonkeyPatch.context() as patch:
            if here:
                short_memory.limit(patch, case.place, ROOM[0], case.layer)
            short_of = HoldOut(rows, 4, halve=True)
            measured = short_of.loss(strategy, said.append)
        with pytest.MonkeyPatch.context() as patch:
            if here:
                short_memory.limit(patch, case.place, 0, case.layer)
            with pytest.raises(OutOfMemory) as refused:
                HoldOut(rows, 1, halve=True).loss(strategy, said.append)
        found.append(
            {
                "measured": measured,
                "expected": HoldOut(rows, 2, halve=True).loss(strategy, said.append),
                "size": short_of.micro_batch_size,
                "said": said,
                "refused": str(refused.value),
                "updated": take(strategy, loader, 0).updated,
            }
        )
    return found


def test_an_evaluation_is_made_again_as_well() -> None:
    """With halves; of one row there are none."""
    for rank in run_ranks(evaluations, 2, EVALUATIONS):
        for case, found in zip(EVALUATIONS, rank, strict=True):
            assert found["measured"] == found["expected"]
            assert found["size"] == 2
            ran_out = f"rank {case.ranks[0]} ran out of memory on cpu"
            (said,) = found["said"]
            assert said.startswith(f"held-out rows: {ran_out}")
            assert said.endswith("with micro-batches of 2 row(s)")
            assert found["refused"].startswith(ran_out)
            assert found["updated"]


def test_the_gradient_is_that_of_the_undivided_step() -> None:
    """Without dropout, whose masks are those of a micro-batch, a split changes rounding alone."""
    spec = replace(tiny_strategy.SPEC, lora=replace(tiny_strategy.SPEC.lora, lora_dropout=0))
    gradients, losses = [], []
    for tokens in (10_000, 128, 64):
        strategy, loader = prepared(spec, 4)
        with pytest.MonkeyPatch.context() as patch:
            short_memory.limit(patch, "backward", tokens, layer=1)
            while True:
                try:
                    losses.append(take(strategy, loader, 0).loss)
                    break
                except OutOfMemory:
                    divide(strategy, loader)
        gradients.append(tiny.gradients(strategy.decoder))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    for divided in gradients[1:]:
        assert 0 < tiny.difference(divided, gradients[0]) <= 1e-5


def test_a_step_that_ran_out_leaves_no_trace() -> None:
    """Neither in the adapters nor in the optimizer, and what it moved is counted nowhere."""
    spec = tiny_strategy.variant("stream", offload=True, activations="offload")
    strategy, loader = prepared(spec, 4)
    take(strategy, loader, 0)
    before = strategy.adapter_state(), strategy.optimizer_state()
    before = tuple(tiny_strategy.copied(state) for state in before)
    with pytest.MonkeyPatch.context() as patch:
        short_memory.limit(patch, "backward", 0, layer=1)
        for _ in range(2):  # whoever tries again without dividing gets the same answer
            with pytest.raises(OutOfMemory, match=r"loop\.micro_batch_size"):
                take(strategy, loader, 1)
    assert strategy._take_traffic().activation_bytes == 0
    for state, old in zip(
        (strategy.adapter_state(), strategy.optimizer_state()), before, strict=True
    ):
        assert all(torch.equal(state[name], old[name]) for name in old)
    assert take(strategy, loader, 1).updated


def test_other_errors_are_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, loader = prepared(tiny_strategy.SPEC, 4)

    def broken(attempt: StepRunner, layer: int) -> None:
        with attempt.computing():
            torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(StepRunner, "forward", broken)
    with pytest.raises(RuntimeError, match=r"inconsistent tensor size|size mismatch"):
        take(strategy, loader, 0)
