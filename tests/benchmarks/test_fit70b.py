"""The fit benchmark on a tiny shape: every strategy runs from bytes made on the spot, and what does
not fit is an answer.
"""

import importlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import short_memory
import torch
from ranks import run_ranks
from smoke import ROOT, Done, quick_run, smoke_run

from fttrain.distributed.process_group import process_group
from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.advice import explain_out_of_memory
from fttrain.memory.parts import MemoryPart
from fttrain.util.errors import UserError

Module = Callable[[str], ModuleType]

LINK_GB_S = 0.5


SMALL = ("--shape=tiny", "--device=cpu", "--threads=1", "--accumulation=2")


def run(file: Path, *arguments: str) -> Done:
    return smoke_run("fit70b.py", file, *SMALL, *arguments)


def run_quickly(file: Path, *arguments: str) -> Done:
    return quick_run("fit70b.py", file, *SMALL, *arguments)


@pytest.mark.slow
def test_every_strategy_runs_and_moves_what_it_should(tmp_path: Path) -> None:
    arguments = ("--seq-len=32", "--steps=2", f"--link-gb-s={LINK_GB_S}", "--backend=gloo")
    done, figures = run(tmp_path / "fit.json", *arguments)
    assert done.returncode == 0, done.stderr
    limits = figures["settings"]["limits"]
    assert 0 < limits["reached"]["copy_gb_s"]["host to host"] <= LINK_GB_S
    assert done.stdout.count(f"{LINK_GB_S:g} asked") == 2  # at the start, and below the table
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
    on_host = (MemoryPart.HOST_EMBEDDING.label, MemoryPart.HOST_HEAD.label)
    tables = dict.fromkeys(on_host, 512 * 128 * 2)
    assert shared["shard"] == tables
    layers = [sum(shared[f"stream k={k}"].values()) - sum(tables.values()) for k in (0, 2)]
    assert layers[0] == 2 * layers[1] > 0


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_two_ranks_fit_on_what_cards_there_are(backend: str, tmp_path: Path) -> None:
    """On a single one NCCL has to believe that they are on two hosts; gloo need not."""
    arguments = ("--device=cuda", f"--backend={backend}", "--seq-len=32", "--steps=2")
    done, figures = run(tmp_path / "fit.json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results = figures["results"]
    assert {(r["outcome"], len(r["ranks"])) for r in results} == {("fits", 2)}
    losses = [result["ranks"][0]["steps"][0]["loss"] for result in results]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)
    for result in results:
        for rank in result["ranks"]:
            assert 0 < rank["reserved_bytes"] < 1 << 30
            assert rank["nvml_card_bytes"] is None or rank["nvml_card_bytes"] > 1 << 27


@pytest.mark.slow
def test_a_refusal_is_a_row_and_the_next_side_runs(tmp_path: Path) -> None:
    """Boundaries of two billion rows have no room on any machine."""
    done, figures = run(
        tmp_path / "fit.json", "--seq-len=2000000000", "--only", "shard", "pipeline"
    )
    assert done.returncode == 0, done.stderr
    results = figures["results"]
    assert [(r["name"], r["outcome"]) for r in results] == [
        ("shard", "refused"),
        ("pipeline", "refused"),
    ]
    for result in results:
        assert "GiB are needed" in result["reason"]
        assert f"refused: {result['side']}: host memory: " in done.stdout


@pytest.mark.parametrize(
    ("argument", "told"),
    [("--tflops=71", "--device=cpu"), ("--only=nothing", "there are shard, stream k=2")],
)
def test_what_cannot_be_run_is_refused_at_once(tmp_path: Path, argument: str, told: str) -> None:
    done, figures = run_quickly(tmp_path / "fit.json", argument)
    assert (done.returncode, figures) == (2, {})
    assert told in done.stderr


def test_a_run_beyond_its_time_is_named_and_fails_the_whole(tmp_path: Path) -> None:
    done, figures = run_quickly(
        tmp_path / "fit.json", "--limit-s=1", "--only=shard", "--steps=1000"
    )
    assert [result["outcome"] for result in figures["results"]] == ["time limit"]
    assert done.returncode == 1


def test_figures_are_noted_after_each_step(module: Module) -> None:
    fit_rank, sides = module("harness.fit_rank"), module("harness.fit_sides")
    unlimited = module("harness.fit_limits").UNLIMITED
    job = {"shape": sides.SHAPES["tiny"], "seq_len": 32, "accumulation": 1, "ranks": 1, "steps": 2}
    job |= {"started_s": 0.0, "limits": unlimited, **sides.usual_sides("tiny")[0].settings}
    noted: list[int] = []

    def note(figures: dict[str, Any]) -> None:
        noted.append(len(figures["steps"]))

    memory = module("common").HostMemory()
    found = fit_rank.run_steps(job, RankGroup(0, 1, 0, torch.device("cpu")), memory, note)
    assert (noted, len(found["steps"])) == ([1, 2], 2)


def test_steps_of_a_run_that_ran_out_of_time_are_kept(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit70b, common = module("fit70b"), module("common")

    def cut(script: str, job: dict[str, Any], folder: Path) -> None:
        assert time.time() < job["ends_s"] <= time.time() + 60
        for rank in range(job["ranks"]):
            monkeypatch.setenv("RANK", str(rank))
            common.note(str(folder / "job.json"), {"steps": [rank]})
        raise SystemExit(128 + signal.SIGALRM)

    monkeypatch.setattr(common, "run_ranks", cut)
    job = {"side": "shard", "seq_len": 32, "steps": 9, "ranks": 2, "limit_s": 600}
    job |= {"started_s": time.time(), "total_s": 60}
    found = fit70b.run(job)
    assert (found["outcome"], found["ranks"]) == ("time limit", [{"steps": [0]}, {"steps": [1]}])


def test_what_there_is_no_time_for_is_not_run(tmp_path: Path) -> None:
    done, figures = run_quickly(tmp_path / "fit.json", "--total-s=5", "--longest")
    assert done.returncode == 0, done.stderr
    assert {(r["outcome"], len(r["ranks"])) for r in figures["results"]} == {("not run", 0)}
    assert {goal["met"] for goal in figures["goals"]} == {None}


def test_rows_are_searched_in_turns_after_all_sides(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known first is what fits at all; then for each side the row that is the goal."""
    fit70b, sides = module("fit70b"), module("harness.fit_sides")
    asked: list[tuple[str, int]] = []

    def run(job: dict[str, Any]) -> dict[str, Any]:
        asked.append((job["side"], job["seq_len"]))
        return {"seq_len": job["seq_len"], "outcome": "fits" if job["seq_len"] < 9000 else "no"}

    monkeypatch.setattr(fit70b, "run", run)
    monkeypatch.setattr(sys, "argv", ["fit70b.py", "--longest", "--accumulation", "1", "8"])
    chosen = sides.usual_sides("llama3_70b")[:2]
    results: list[dict[str, Any]] = []
    assert len(list(fit70b.measure(fit70b._arguments(), chosen, None, 0.0, results))) == len(asked)
    names = [f"{side.name}, accumulation 1" for side in chosen]
    assert asked[:4] == [
        *((name, 2048) for name in names),
        *((f"{side.name}, accumulation 8", 2048) for side in chosen),
    ]
    assert asked[4:6] == [(name, module("harness.fit_goals").LONGEST_TOKENS) for name in names]
    assert [len(result.get("tries", [])) for result in results] == [3, 3, 0, 0]


def test_a_search_ends_where_no_time_is_left(module: Module) -> None:
    """What was not run is no row that does not fit."""
    outcomes = iter(["fits", "not run"])
    tries = list(
        module("fit70b").search(
            list(range(10, 90, 10)), lambda tokens: {"seq_len": tokens, "outcome": next(outcomes)}
        )
    )
    assert [found["outcome"] for found in tries] == ["fits", "not run"]


def runs_out_of_memory(benchmarks: str) -> tuple[int, str]:
    """Rank 1's memory does not suffice, rank 0's does: the exit code and the reason."""
    sys.path.insert(0, benchmarks)
    common, fit_rank = (importlib.import_module(name) for name in ("common", "harness.fit_rank"))
    sides, limits = (importlib.import_module(f"harness.fit_{name}") for name in ("sides", "limits"))
    memory = common.HostMemory()
    job = {"shape": sides.SHAPES["tiny"], "seq_len": 64, "accumulation": 1, "ranks": 2, "steps": 1}
    job |= {"started_s": 0.0, "limits": limits.UNLIMITED, **sides.usual_sides("tiny")[0].settings}
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            process_group(torch.device("cpu")) as group,
        ):
            if group.rank == 1:
                short_memory.limit(patch, "forward", 32)
            fit_rank.run_steps(job, group, memory)
    except UserError as error:
        return error.exit_code, str(error)
    raise AssertionError("nothing was raised")


def test_all_ranks_end_alike_where_one_runs_out_of_memory(module: Module) -> None:
    outcomes = module("fit70b").OUTCOMES
    found = run_ranks(runs_out_of_memory, 2, str(ROOT / "benchmarks"), process_group=False)
    assert [outcomes[code] for code, _ in found] == ["out of memory"] * 2
    assert all("rank 1 ran out of memory" in said for _, said in found)


@pytest.mark.parametrize(
    ("size_bytes", "outcome"), [(1 << 60, "out of memory"), (1 << 10, "refused")]
)
def test_what_is_too_small_while_building_is_told_apart(
    module: Module, size_bytes: int, outcome: str
) -> None:
    """Memory that really runs out, beside a machine that the ledger say is too small."""
    fit_rank = module("harness.fit_rank")

    def build() -> None:
        with (
            fit_rank.answer(UserError, fit_rank.REFUSED),
            explain_out_of_memory((), 0, torch.device("cpu")),
        ):
            torch.empty(size_bytes, dtype=torch.uint8)
            raise UserError("host memory: 2 GiB are needed")

    with pytest.raises(UserError) as caught:
        build()
    assert module("fit70b").OUTCOMES[caught.value.exit_code] == outcome


@pytest.mark.parametrize("room", range(0, 90, 10))
def test_the_longest_row_is_found_in_four_runs_of_eight(module: Module, room: int) -> None:
    lengths = list(range(10, 90, 10))

    def run(length: int) -> dict[str, Any]:
        return {"seq_len": length, "outcome": "fits" if length <= room else "out of memory"}

    tries = list(module("fit70b").search(lengths, run))
    assert len(tries) <= 4
    first = {"seq_len": 5, "outcome": "fits", "tries": tries}
    assert module("harness.fit_report").longest(first) == max(5, room)
