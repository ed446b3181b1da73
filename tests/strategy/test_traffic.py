"""Bytes that a step moves: what the formulas say, no more and no fewer."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_strategy
from ranks import run_ranks

from fttrain.strategy.protocol import StepStats

RANKS, HIDDEN, TABLE_BYTES = 2, 64, 4 * 300 * 64
LAYER_BYTES = tiny_strategy.base().frozen_format.layout.size_bytes


@dataclass(frozen=True)
class Case:
    """A strategy, and how many of its layers move through how many slots."""

    strategy: str
    moving: int = 0
    slots: int = 2
    resident_layers: Any = 0
    lm_head: str = "device"

    @property
    def ranks(self) -> int:
        """As few as show what it moves: each rank of a stream moves what a single one does."""
        return 2 if self.strategy == "shard" or isinstance(self.resident_layers, tuple) else 1


CASES = [
    Case("replicate"),
    Case("replicate", lm_head="host"),
    Case("shard", 5),
    Case("stream", 5),
    Case("stream", 3, resident_layers=2),
    Case("stream", 4, 3, resident_layers=1),
    Case("stream", 2, resident_layers=3),
    Case("stream", 1, 3, resident_layers=4),
    Case("stream", 0, resident_layers="all", lm_head="host"),
    Case("stream", 3, resident_layers=(2, 2), lm_head="host"),
]
SPLITS = [(3, "all"), (3, 1), (3, 2)]  # accumulation, G


def steps(case: Case, split: tuple[int, int | str]) -> list[StepStats]:
    accumulation, group = split
    spec = tiny_strategy.variant(
        case.strategy,
        group,
        resident_layers=case.resident_layers,
        slots=case.slots,
        lm_head=case.lm_head,
    )
    strategy = tiny_strategy.build(spec, tiny_strategy.base())
    batches = tiny_strategy.micro_batches(strategy)[:accumulation]
    return [strategy.train_step(batches, step, 1e-2, lambda *_: True) for step in range(2)]


def on_rank() -> tuple[dict[Any, list[StepStats]], dict[str, list[StepStats]]]:
    pipelines = {}
    for dtype in ("float32", "bfloat16"):
        spec = tiny_strategy.variant("pipeline", dtype=dtype, lm_head="host")
        strategy = tiny_strategy.build(spec, tiny_strategy.base(dtype=dtype))
        # What an evaluation or an answer moves belongs to no step.
        if dtype == "float32":
            strategy.evaluate(tiny_strategy.micro_batches(strategy))
        else:
            strategy.generate([[3, 4, 5]], 2, set())
        pipelines[dtype] = [tiny_strategy.apply(strategy, step) for step in range(2)]
    return grouped(RANKS), pipelines


def grouped(ranks: int) -> dict[Any, list[StepStats]]:
    cases = [case for case in CASES if case.ranks == ranks]
    return {(case, split): steps(case, split) for case in cases for split in SPLITS}


@functools.cache
def found() -> list[tuple[dict[Any, list[StepStats]], dict[str, list[StepStats]]]]:
    """Of each of two ranks."""
    return run_ranks(on_rank, RANKS)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_are_brought_once_a_pass(case: Case, split: tuple[int, int | str]) -> None:
    """Up and down for each group of micro-batches; the layers that lie in the slots at a turn are
    there already, from the very first pass on. Ranks receive the others' parts of a layer.
    """
    accumulation, group = split
    groups = -(-accumulation // (accumulation if group == "all" else int(group)))
    of_a_layer = LAYER_BYTES * (RANKS - 1) // RANKS if case.strategy == "shard" else LAYER_BYTES
    ranks = [steps(case, split)] if case.ranks == 1 else [rank[case, split] for rank, _ in found()]
    for rank in ranks:
        for number, stats in enumerate(rank):
            brought = 2 * groups * max(0, case.moving - case.slots)
            brought += min(case.moving, case.slots) * (number == 0)
            moved = of_a_layer * brought
            head = TABLE_BYTES * groups * (case.lm_head == "host")
            gathered = moved if case.strategy == "shard" else 0
            assert stats.traffic.gather_bytes == gathered
            assert stats.traffic.h2d_bytes == moved - gathered + head
            assert stats.traffic.stage_bytes == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pipeline_moves_boundaries_alone(dtype: str) -> None:
    """The activations of each micro-batch that has tokens, up; their gradients, down."""
    rows = sum(-(-sum(lengths) // 64) * 64 for lengths in tiny_strategy.LENGTHS)
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    micro_batches = sum(map(bool, tiny_strategy.LENGTHS))
    for rank, (_, pipelines) in enumerate(found()):
        for stats in pipelines[dtype]:
            assert stats.traffic.stage_bytes == rows * HIDDEN * itemsize
            assert stats.traffic.gather_bytes == stats.sync.sync_bytes == 0
            head = TABLE_BYTES * itemsize // 4 * micro_batches
            assert stats.traffic.h2d_bytes == head * (rank == RANKS - 1)
