"""What the fit benchmark aims at is met, missed or not measured, and its table says what it is."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Module = Callable[[str], ModuleType]
GIB = 2**30
MOVED = ("gather_bytes", "h2d_bytes", "stage_bytes", "activation_bytes")
SETTINGS = {
    "shape": "llama3_70b",
    "device": "cuda",
    "seq_len": 2048,
    "ranks": 2,
    "limits": {"asked": {"tflops": 71, "link_gb_s": 12}},
}
NAMES = ["shard", "stream k=30", "stream k=0", "pipeline"]


def result(
    name: str, outcome: str = "fits", own: float | None = None, **more: Any
) -> dict[str, Any]:
    """One as ``fit70b.py`` makes it, with ranks of 5 GiB by the allocator and ``own`` by NVML;
    ``more``: of the ranks.
    """
    step = dict.fromkeys(MOVED, 0)
    rank = {
        "steps": [step | {"step_s": 1.0, "wait_s": 0.5, "tokens": 64}],
        "reserved_bytes": 5 * GIB,
        "nvml_bytes": own and int(own * GIB),
        "nvml_card_bytes": None,
        "peak_host_bytes": 40 * GIB,
        "shared_host_bytes": {"frozen layers": 30 * GIB},
        "shared_device": True,
        "device_name": "card",
        **more,
    }
    ranks = [rank, rank] if outcome == "fits" else []
    found = {"name": name, "side": name, "accumulation": 1, "seq_len": 2048}
    return {**found, "outcome": outcome, "reason": "", "ranks": ranks}


def met(goals: list[dict[str, Any]], text: str) -> list[bool | None]:
    """Of the goals with ``text`` in them."""
    return [goal["met"] for goal in goals if text in goal["goal"]]


def test_what_fits_is_met_missed_or_not_measured(module: Module) -> None:
    goals = module("harness.fit_goals").goals
    results = [
        result("shard", own=23.5),  # the context takes it beyond the card
        result("stream k=30", own=23.3),
        result("stream k=0"),
        result("pipeline", "time limit"),
    ]
    found = goals(results, SETTINGS, NAMES)
    assert met(found, "23.4 GiB") == [False, True, True, None]
    assert met(found, "8 GiB") == [True]
    assert found[2]["values"] == {"stream k=0": pytest.approx(5.6)}
    results = [result("shard", "refused"), result("stream k=0", own=8.1), result("a lever")]
    found = goals(results, SETTINGS, NAMES)
    assert met(found, "23.4 GiB") == [False, None, True, None, True]
    assert met(found, "8 GiB") == [False]
    for other in ({"seq_len": 4096}, {"ranks": 1}, {"shape": "tiny"}):
        assert {goal["met"] for goal in goals(results, SETTINGS | other, NAMES)} == {None}


def test_the_longest_row_has_a_goal(module: Module) -> None:
    goals = module("harness.fit_goals").goals
    tries = [(8192, "fits"), (16384, "fits"), (24576, "out of memory")]
    long = result("shard") | {"tries": [{"seq_len": t, "outcome": o} for t, o in tries]}
    short = result("pipeline") | {"tries": long["tries"][:1]}
    found = goals([long, short, result("stream k=0")], SETTINGS, NAMES)
    assert met(found, "rows of 16384") == [True, None, None, False]
    for unknown in ("time limit", "not run"):
        cut = {"tries": [*short["tries"], {"seq_len": 16384, "outcome": unknown}]}
        found = goals([long, short | cut], SETTINGS, NAMES)
        assert met(found, "rows of 16384") == [True, None, None, None]


def test_offloading_is_compared_with_its_own_strategy_under_both_limits(module: Module) -> None:
    goals = module("harness.fit_goals").goals
    faster = [dict.fromkeys(MOVED, 0) | {"step_s": 0.7, "wait_s": 0.0, "tokens": 64}]
    results = [
        result("shard", shared_device=False),
        result("shard activations=offload", shared_device=False),  # as fast
        result("stream k=0", shared_device=False),
        result("stream k=0 activations=offload", shared_device=False, steps=faster),
    ]
    found = goals(results, SETTINGS, NAMES)
    assert met(found, "recompute") == [False, True]
    assert found[-1]["values"] == {"accumulation 1": pytest.approx(1 / 0.7)}
    one_limit = SETTINGS | {"limits": {"asked": {"tflops": 71, "link_gb_s": None}}}
    for settings in (one_limit, SETTINGS | {"limits": None}):
        assert met(goals(results, settings, NAMES), "recompute") == [None, None]
    shared = [result(r["name"]) for r in results]
    assert met(goals(shared, SETTINGS, NAMES), "recompute") == [None, None]


def test_the_table_says_what_it_does_not_know(
    module: Module, capsys: pytest.CaptureFixture[str]
) -> None:
    report, common = module("harness.fit_report"), module("common")
    # Host memory: 10 GiB of each rank, and the 30 GiB that both map once.
    assert report.row(result("shard"))[1:6] == ["yes", "5.00", "-", "-", "50.00"]
    one, other = (result("pipeline")["ranks"][0] for _ in range(2))
    other["shared_host_bytes"] = {"head": 20 * GIB}  # not what the first maps
    assert report.host_bytes([one, other]) == 80 * GIB
    settings = SETTINGS | {"backend": "auto", "cap_gib": 23.4, "steps": 1, "limits": None}
    report.show([result("shard"), result("pipeline", "failed")], settings, common.environment())
    said = " ".join(capsys.readouterr().out.split())
    assert "NCCL over its socket transport" in said
    assert "not representative" in said
