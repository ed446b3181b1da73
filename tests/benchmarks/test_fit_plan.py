"""What the planner says of fit70b.py's runs: paired with the right figures, and printed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from smoke import quick_run

from fttrain.plan.choose import judge
from fttrain.rig.profile import (
    CardProfile,
    CopyRates,
    HostProfile,
    LinkProfile,
    LinkSample,
    RigProfile,
)
from fttrain.util.units import GIB

Module = Callable[[str], ModuleType]
SETTINGS = {"shape": "tiny", "ranks": 2, "cap_gib": 1.6, "seq_len": 64}
ROOM_BYTES = GIB  # that the cap leaves


def result(module: Module, side: int, *reserved_bytes: int, **more: Any) -> dict[str, Any]:
    """As fit70b.py writes it, of a usual side; without figures one that did not fit."""
    found = module("harness.fit_sides").usual_sides("tiny")[side]
    ranks = [{"reserved_bytes": size_bytes} for size_bytes in reserved_bytes]
    outcome = "fits" if ranks else "out of memory"
    what = {"side": f"{found.name}, accumulation 2", "accumulation": 2, **found.settings}
    return {**what, "seq_len": 64, "outcome": outcome, "ranks": ranks, **more}


def test_a_run_stands_beside_what_a_plan_of_the_same_says(module: Module) -> None:
    """Of the same recipe on such cards, by the way that `fttrain plan` goes."""
    predict, steps = module("harness.fit_predict"), module("harness.fit_steps")
    shape = module("harness.fit_sides").SHAPES["tiny"]
    longer = {"seq_len": 128, "outcome": "fits", "ranks": [{"reserved_bytes": 5 * 10**6}] * 2}
    runs = [result(module, 0, 4 * 10**6, 2 * 10**6, tries=[longer]), result(module, 0)]
    shard, long_rows, too_big = predict.pairs(runs, SETTINGS, shape)

    rates = CopyRates(1e9)
    card = CardProfile("card", "cuda", ROOM_BYTES, 1e12, 1e12, 1e12, rates, rates)
    samples = {name: (LinkSample(1, 1e-3),) for name in ("all_gather", "all_reduce", "send_recv")}
    host = HostProfile("cpu", 8, 64 << 30, adamw_values_per_s=1e9)
    rig = RigProfile("two", (card, card), host, (LinkProfile("default", "", 2, samples),))
    for pair, seq_len in ((shard, 64), (long_rows, 128), (too_big, 64)):
        spec = steps.trial_spec({**runs[0], "seq_len": seq_len})
        planned = judge(spec, steps.architecture_of(shape), rig)
        peak = max(max(own.device_bytes, own.reserved_device_bytes) for own in planned.memory)
        assert (pair["predicted_bytes"], pair["predicted_to_fit"]) == (peak, planned.fits)
        assert (pair["side"], pair["seq_len"]) == (runs[0]["side"], seq_len)

    assert shard["measured_bytes"] == 4 * 10**6, "of the fullest card"
    assert shard["off"] == pytest.approx(shard["predicted_bytes"] / (4 * 10**6) - 1)
    assert long_rows["predicted_bytes"] > shard["predicted_bytes"]
    assert (too_big["measured_bytes"], too_big["off"]) == (None, None)
    goal = predict.goal([shard, long_rows, too_big])
    assert list(goal["values"].values()) == [shard["off"], long_rows["off"]]


def test_the_goal_is_met_within_three_percent_alone(module: Module) -> None:
    goal = module("harness.fit_predict").goal
    near, far, none = ({"side": "shard", "seq_len": 64, "off": off} for off in (0.03, -0.04, None))
    assert [goal(found)["met"] for found in ([near], [near, far | {"seq_len": 1}], [none], [])] == [
        True,
        False,
        None,
        None,
    ]


def test_what_does_not_fit_is_predicted_so(module: Module) -> None:
    predict = module("harness.fit_predict")
    shape = module("harness.fit_sides").SHAPES["tiny"]
    (pair,) = predict.pairs([result(module, 0)], SETTINGS | {"cap_gib": 0.601}, shape)
    assert not pair["predicted_to_fit"]
    assert predict.row(pair)[-2:] == ["does not fit", "out of memory"]


def test_the_script_compares(module: Module, tmp_path: Path) -> None:
    fit = tmp_path / "fit.json"
    fit.write_text(json.dumps({"settings": SETTINGS, "results": [result(module, 0, 4 * 10**6)]}))
    done, figures = quick_run("fit_plan.py", tmp_path / "figures.json", str(fit))
    assert done.returncode == 0, done.stderr
    assert "shard, accumulation 2" in done.stdout
    (found,) = figures["results"]
    assert found["measured_bytes"] == 4 * 10**6
    assert figures["goals"][0]["values"] == {"shard, accumulation 2, T=64": found["off"]}


def test_the_command_is_given_the_rig_that_was_measured(
    module: Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so where it is not there: the other settings were taken."""
    shape = module("harness.fit_sides").SHAPES["tiny"]
    rig = tmp_path / "profile.json"
    assert module("fit_plan").plan_command(str(rig), shape, 64) != 0
    assert f"{rig}: no rig profile is there" in capsys.readouterr().err
