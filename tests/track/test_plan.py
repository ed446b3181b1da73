"""Predicted and measured, from files whose figures are reckoned by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from fttrain.track.plan import plan_section
from fttrain.track.report import write_report
from fttrain.training.auto_plan import add_measured, write_plan

GIB = 2**30
OTHER = {"settings": "strategy=shard", "predicted": {"step_s": 9.0}}
PLAN: dict[str, Any] = {
    "rig": "made up",
    "ran": "strategy=stream",
    "candidates": [
        OTHER,
        {
            "settings": "strategy=stream",
            "predicted": {
                "step_s": 2.0,
                "tokens_per_s": 500.0,
                "peak_device_bytes": 8 * GIB,
                "peak_host_bytes": 4 * GIB,
            },
        },
    ],
}


def write_metrics(folder: Path, **changed: float) -> None:
    """Steps 1 to 5; the first one warms up."""
    lines = [
        {
            "step": step,
            "loss": 4.0,
            "step_s": step_s,
            "tokens_per_s": 1000 / step_s,
            "peak_device_bytes": min(step, 3) * 3 * GIB,
            "peak_host_bytes": 3 * GIB,
            **changed,
        }
        for step, step_s in enumerate((50.0, 2.5, 2.4, 2.5, 2.6), start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_the_reports_section(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    write_plan(tmp_path, PLAN, 0)
    section = (
        "## Plan and measured\n\n`strategy=stream`, for made up\n\n"
        "| | predicted | measured | difference |\n|---|---|---|---|\n"
        "| seconds a step, median | 2.000 s | 2.500 s | +25.0 % |\n"
        "| tokens/s, median | 500 | 400 | -20.0 % |\n"
        "| peak device memory of a rank | 8.00 GiB | 9.00 GiB | +12.5 % |\n"
        "| peak host memory of a rank | 4.00 GiB | 3.00 GiB | -25.0 % |"
    )
    assert section in write_report(tmp_path).read_text()


@pytest.mark.parametrize(("size", "told"), [(1, "| 4 | 1 | -75.0 % |"), (4, "")])
def test_micro_batches_that_were_divided_are_told(size: int, told: str, tmp_path: Path) -> None:
    """What was planned was another step."""
    ran = "strategy=stream loop.micro_batch_size=4 loop.gradient_accumulation_steps=2"
    write_metrics(tmp_path, micro_batch_size=size)
    one = {**PLAN["candidates"][1], "settings": ran}
    write_plan(tmp_path, {**PLAN, "ran": ran, "candidates": [one]}, 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # the held-out loss of an unlogged step
        file.write(json.dumps({"step": 6, "eval_nll": 3.0}) + "\n")
    row = (
        f"| rows of a micro-batch, since memory ran out {told}\n| seconds a step, median | 2.000 s"
    )
    text = write_report(tmp_path).read_text()
    assert (row in text) is bool(told)
    assert ("ran out" in text) is bool(told)


def test_what_is_not_known_has_no_line(tmp_path: Path) -> None:
    write_metrics(tmp_path, peak_device_bytes=0)  # a CPU
    alone = {"settings": "strategy=stream", "predicted": {"step_s": 2.0, "peak_device_bytes": GIB}}
    write_plan(tmp_path, {**PLAN, "candidates": [alone]}, 0)
    text = write_report(tmp_path).read_text()
    assert "| seconds a step, median | 2.000 s | 2.500 s | +25.0 % |" in text
    assert "| 1.00 GiB |" not in text
    assert "tokens/s, median | 5" not in text


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"candidates": []}', '{"ran": "x", "candidates": [], "rig": "y"}']
)
def test_without_a_runs_plan_there_is_no_section(tmp_path: Path, content: str | None) -> None:
    write_metrics(tmp_path)
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    assert "Plan and measured" not in write_report(tmp_path).read_text()
    add_measured(tmp_path)
    assert (tmp_path / "plan.json").exists() is (content is not None)


def test_before_the_first_step(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN, 0)
    assert plan_section(tmp_path, []) is None


def test_what_was_measured_goes_into_the_plan(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    write_plan(tmp_path, PLAN, 0)
    add_measured(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    expected = {"step_s": 2.5, "tokens_per_s": 400.0}
    expected |= {"peak_device_bytes": 9 * GIB, "peak_host_bytes": 3 * GIB}
    assert plan["candidates"][1]["measured"] == expected
    assert plan["candidates"][0] == OTHER


def test_steps_under_other_settings_do_not_count(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    write_plan(tmp_path, {**PLAN, "ran": "strategy=shard"}, 0)
    write_plan(tmp_path, PLAN, 4)  # resumed
    write_plan(tmp_path, PLAN, 5)  # and again, with the same
    add_measured(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["since_step"] == 4
    assert plan["candidates"][1]["measured"]["step_s"] == 2.6
    write_plan(tmp_path, None, 5)  # now without a profile
    assert not (tmp_path / "plan.json").exists()
