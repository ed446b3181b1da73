"""The benchmark of plans: what is run is what is planned; errors are the worst rank's."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

Module = Callable[[str], ModuleType]


def test_rows_are_full_and_every_token_is_a_target(module: Module) -> None:
    packed = [[[[[([1, 2, 3], [-100, 2, 3]), ([4], [4])]]], [[[([5, 6], [5, -100])]]]]]
    work = SimpleNamespace(job={"seq_len": 4}, steps={"packed": packed})
    steps = module("plan_error").full_rows(work)
    rows = [row for rank in steps[0] for micro_batch in rank for row in micro_batch]
    assert rows == [[([1, 2, 3, 4], [1, 2, 3, 4])], [([5, 6, 1, 2], [5, 6, 1, 2])]]


def test_larger_micro_batches_are_fewer(module: Module) -> None:
    benchmark = module("plan_error")
    side = next(side for side in benchmark.SIDES if "rows=8" in side.name)
    rows = [[("a",)], [("b",)], [("c",)], [("d",)]]
    job = {"micro_batch_size": 4, "gradient_accumulation_steps": 4, "steps": [[rows, rows]]}
    found = benchmark.changed(job, side)
    assert found["steps"] == [[[[("a",), ("b",)], [("c",), ("d",)]]] * 2]
    assert found["gradient_accumulation_steps"] == 2


def test_an_error_is_that_of_the_rank_that_is_off_most(module: Module) -> None:
    benchmark = module("plan_error")
    turn = [
        {"step_s": [1.0, 3.0], "peak_host_bytes": 1000, "interpreter_bytes": 100},
        {"step_s": [2.0, 2.0], "peak_host_bytes": 500, "interpreter_bytes": 100},
    ]
    plan = benchmark.Expected([1150, 500], 2.0)  # 1,050 and 400 above the interpreter
    found = benchmark.compared(benchmark.SIDES[0], plan, [turn])
    assert found["peak_error"] == pytest.approx(-0.2)
    assert found["measured_step_s"] == 2.5
    assert found["step_error"] == pytest.approx(-0.2)
    assert [goal["met"] for goal in benchmark.goals([found])] == [False, False]
