"""What trackers show of a run, from its files; figures are reckoned by hand."""

import json
from pathlib import Path

import pytest

from fttrain.track import Results, Table, read_results
from fttrain.training.auto_plan import add_measured, write_plan

CANDIDATES = [
    {"settings": "strategy=shard", "fits": False, "reason": "card 0", "predicted": {}},
    {
        "settings": "strategy=stream",
        "fits": True,
        "step_s": 2.0,
        "kwh": None,
        "reason": "",
        "predicted": {"step_s": 2.0},
    },
]
SAMPLE = {"prompt": "why?", "reference": "so", "before": "hm", "after": ""}


def written(folder: Path, after: str = "") -> Path:
    """A run of four steps, with a held-out loss on the way that is the best one."""
    lines = [
        {"step": step, "loss": 4.0, "step_s": step_s, "tokens_per_s": 10 / step_s}
        for step, step_s in enumerate((5.0, 2.5, 2.0, 2.5), start=1)
    ]
    lines[1] |= {"holdout_nll": 3.0, "peak_host_bytes": 7, "peak_device_bytes": 0}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    evaluation = {
        "base": {"nll": 4.0},
        "tuned": {"nll": 3.5} if after else None,
        "history": [{"step": 0, "nll": 4.0}, {"step": 2, "nll": 3.0}]
        + ([{"step": 4, "nll": 3.5}] if after else []),
        "samples": [SAMPLE | {"after": after}],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def test_nothing_is_known_of_an_empty_folder(tmp_path: Path) -> None:
    assert read_results(tmp_path, 0) == Results()


def test_a_run_that_ended(tmp_path: Path) -> None:
    written(tmp_path, after="because")
    write_plan(tmp_path, {"rig": "made up", "ran": "strategy=stream", "candidates": CANDIDATES}, 0)
    add_measured(tmp_path)
    links = {"links": Table(("", "nccl"), [])}
    found = read_results(tmp_path, 4, links)
    assert found.holdout_nll == 3.5
    assert found.summary == {
        "tokens_per_s_median": 4.0,
        "step_s_median": 2.5,
        "peak_host_bytes_max": 7,
        "holdout_nll_base": 4.0,
        "holdout_nll_best": 3.0,
        "holdout_nll_last": 3.5,
    }
    assert list(found.tables) == ["samples", "plan", "plan_and_measured"], "none without rows"
    assert found.tables["samples"].rows == [["why?", "so", "hm", "because"]]
    assert found.tables["plan"] == Table(
        ["settings", "fits", "step_s", "reason"],  # what no candidate has is no column
        [["strategy=shard", False, None, "card 0"], ["strategy=stream", True, 2.0, ""]],
    )
    assert found.tables["plan_and_measured"].rows == [
        ["seconds a step, median", "2.000 s", "2.500 s", "+25.0 %"]
    ]


@pytest.mark.parametrize(("step", "nll"), [(0, 4.0), (1, None), (2, 3.0), (3, None)])
def test_the_held_out_loss_of_a_run_that_goes_on(
    step: int, nll: float | None, tmp_path: Path
) -> None:
    """Of this very step; that of an end which the run went on from, or dropped, does not count."""
    found = read_results(written(tmp_path, after="because"), step)
    assert found.holdout_nll == nll
    assert found.summary["holdout_nll_best"] == (3.0 if step >= 2 else 4.0)


def test_a_table_as_markdown() -> None:
    table = Table(("a", "b"), [["x | y", None], ["two\nlines", 0.123456]])
    assert table.markdown().splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| x \\| y |  |",
        "| two<br>lines | 0.1235 |",
    ]
