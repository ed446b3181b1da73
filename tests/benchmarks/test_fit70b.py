"""The fit benchmark on a tiny shape: every strategy runs from bytes made on the spot, and what does
not fit is an answer.
"""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ranks import run_ranks
from smoke import ROOT, smoke_run

from fttrain.dist import process_group
from fttrain.errors import UserError


def run(file: Path, *arguments: str) -> tuple["subprocess.CompletedProcess[str]", dict[str, Any]]:
    """A smoke run and the JSON it left."""
    small = ("--shape=tiny", "--device=cpu", "--threads=1", "--accumulation=2")
    return smoke_run("fit70b.py", file, *small, *arguments)


def test_every_strategy_runs_and_moves_what_it_should(tmp_path: Path) -> None:
    done, figures = run(tmp_path / "fit.json", "--seq-len=32", "--steps=2")
    assert done.returncode == 0, done.stderr
    results = figures["results"]
    last = {result["name"]: result["ranks"][1]["steps"][-1] for result in results}
    for kind, mover in (("gather_bytes", "shard"), ("stage_bytes", "pipeline")):
        assert [side for side, step in last.items() if step[kind]] == [mover]
    # The streamed head everywhere. The two layers that k=2 does not keep stay in its two slots.
    head_bytes = last["shard"]["h2d_bytes"]
    assert last["stream k=0"]["h2d_bytes"] > last["stream k=2"]["h2d_bytes"] == head_bytes > 0
    losses = [result["ranks"][0]["steps"][0]["loss"] for result in results]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)  # one model, one data
    # The two tables (512, 128) in bf16 lie in the one host copy, and four layers, then two.
    shared = {result["name"]: result["ranks"][0]["shared_host_bytes"] for result in results}
    tables = dict.fromkeys(("embedding", "head"), 512 * 128 * 2)
    assert shared["shard"] == tables
    layers = [sum(shared[f"stream k={k}"].values()) - sum(tables.values()) for k in (0, 2)]
    assert layers[0] == 2 * layers[1] > 0


def test_a_refusal_is_a_row_and_the_next_side_runs(tmp_path: Path) -> None:
    """Boundaries of two billion rows have no room on any machine."""
    done, figures = run(tmp_path / "fit.json", "--seq-len=2000000000", "--only", "shard", "pipe")
    assert done.returncode == 0, done.stderr
    results = figures["results"]
    assert [(r["name"], r["outcome"]) for r in results] == [
        ("shard", "refused"),
        ("pipeline", "refused"),
    ]
    for result in results:
        assert "GiB are needed" in result["reason"]
        assert f"refused: {result['side']}: host memory: " in done.stdout


def test_a_run_beyond_its_time_is_named_and_fails_the_whole(tmp_path: Path) -> None:
    done, figures = run(tmp_path / "fit.json", "--limit-s=1", "--only=shard", "--steps=1000")
    assert [result["outcome"] for result in figures["results"]] == ["time limit"]
    assert done.returncode == 1


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module of the benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def runs_out_of_memory(benchmarks: str) -> tuple[int, str]:
    """Rank 1's card is too small, while rank 0 waits for it: the exit code and the reason."""
    sys.path.insert(0, benchmarks)
    fit_rank = importlib.import_module("harness.fit_rank")
    try:
        with (
            process_group(torch.device("cpu")) as group,
            fit_rank.answer(torch.OutOfMemoryError, fit_rank.OUT_OF_MEMORY),
        ):
            if group.rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")
            group.barrier()
    except UserError as error:
        return error.exit_code, str(error)
    raise AssertionError("nothing was raised")


def test_all_ranks_end_alike_where_one_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = module(monkeypatch, "fit70b").OUTCOMES
    found = run_ranks(runs_out_of_memory, 2, str(ROOT / "benchmarks"), process_group=False)
    assert [outcomes[code] for code, _ in found] == ["out of memory"] * 2
    assert [said for _, said in found] == ["rank 1: CUDA out of memory.", "CUDA out of memory."]


@pytest.mark.parametrize("room", range(0, 90, 10))
def test_the_longest_row_is_found_in_four_runs_of_eight(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    lengths = list(range(10, 90, 10))

    def run(length: int) -> dict[str, Any]:
        return {"seq_len": length, "outcome": "fits" if length <= room else "out of memory"}

    tries = list(module(monkeypatch, "fit70b").search(lengths, run))
    assert len(tries) <= 4
    first = {"seq_len": 5, "outcome": "fits", "tries": tries}
    assert module(monkeypatch, "harness.fit_report").longest(first) == max(5, room)


def result(name: str, outcome: str = "fits", own: float | None = None) -> dict[str, Any]:
    """One as ``fit70b.py`` makes it, with ranks of 5 GiB by the allocator and ``own`` by NVML."""
    gib = 2**30
    step = dict.fromkeys(("gather_bytes", "h2d_bytes", "stage_bytes"), 0)
    rank = {
        "steps": [step | {"step_s": 1.0, "wait_s": 0.5, "tokens": 64}],
        "reserved_bytes": 5 * gib,
        "nvml_bytes": own and int(own * gib),
        "nvml_card_bytes": None,
        "peak_host_bytes": 40 * gib,
        "shared_host_bytes": {"frozen layers": 30 * gib},
        "shared_device": True,
        "device_name": "card",
    }
    ranks = [rank, rank] if outcome == "fits" else []
    return {"side": name, "name": name, "outcome": outcome, "reason": "", "ranks": ranks}


SETTINGS = {"shape": "llama3_70b", "device": "cuda", "seq_len": 2048}
NAMES = ["shard", "stream k=30", "stream k=0", "pipeline"]


def test_goals_are_met_missed_or_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    goals = module(monkeypatch, "harness.fit_report").goals
    results = [
        result("shard", own=23.5),  # the context takes it beyond the card
        result("stream k=30", own=23.3),
        result("stream k=0"),
        result("pipeline", "time limit"),
    ]
    assert [goal["met"] for goal in goals(results, SETTINGS, NAMES)] == [
        False,
        True,
        True,
        None,
        True,
    ]
    assert goals(results, SETTINGS, NAMES)[2]["values"] == {"stream k=0": pytest.approx(5.6)}
    results = [result("shard", "refused"), result("stream k=0", own=8.1)]
    assert [goal["met"] for goal in goals(results, SETTINGS, NAMES)] == [
        False,
        None,
        True,
        None,
        False,
    ]
    longer = SETTINGS | {"seq_len": 4096}
    assert {goal["met"] for goal in goals(results, longer, NAMES)} == {None}


def test_the_table_says_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, common = module(monkeypatch, "harness.fit_report"), module(monkeypatch, "common")
    # Host memory: 10 GiB of each rank, and the 30 GiB that both map once.
    assert report.row(result("shard"))[1:6] == ["yes", "5.00", "-", "-", "50.00"]
    one, other = (result("pipeline")["ranks"][0] for _ in range(2))
    other["shared_host_bytes"] = {"head": 20 * 2**30}  # not what the first maps
    assert report.host_bytes([one, other]) == 80 * 2**30
    settings = SETTINGS | {"ranks": 2, "cap_gib": 23.4, "steps": 1}
    report.show([result("shard"), result("pipeline", "failed")], settings, common.environment())
    said = " ".join(capsys.readouterr().out.split())
    assert "NCCL over its socket transport" in said
    assert "not representative" in said
