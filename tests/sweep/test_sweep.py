"""Sweeps as a whole: failures, kills, signals, re-runs, the search's values, places, pruning."""

import json
import math
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.plugins import Plugins
from tiny_sweep import WAIT_S, eventually, is_alive, pids, run

from fttrain.sweep import cards
from fttrain.sweep.record import Record, records


def states(output: Path) -> dict[str, str]:
    return {record.name: record.state for record in records(output)}


def trials(output: Path) -> list[dict[str, Any]]:
    """Of sweep.json, the best first."""
    found: list[dict[str, Any]] = json.loads((output / "sweep.json").read_text())["trials"]
    return found


def starts(output: Path, name: str) -> int:
    return len((output / name / "starts").read_text().splitlines())


@pytest.mark.usefixtures("quick")
def test_failed_trials_leave_the_others_alone_and_are_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One says why it fails, one is killed; a second sweep runs these two only."""
    output = tmp_path / "sweep"
    output.mkdir()
    (output / "broken").touch()
    assert run(output, "loop.seed=13,1,14,2") == 1
    told = capsys.readouterr()
    assert "loop.seed=13: failed" in told.out
    assert "Traceback" not in told.out + told.err
    rows = {row["name"]: row for row in trials(output)}
    assert rows["loop.seed=13"]["reason"] == "the loss ran away"
    assert rows["loop.seed=13"]["exit_code"] == 3
    assert "killed by SIGKILL" in rows["loop.seed=14"]["reason"]
    page = (output / "sweep.md").read_text()
    assert "failed: the loss ran away" in page
    assert [row["state"] for row in trials(output)] == ["done", "done", "failed", "failed"]
    before = {path: path.stat().st_mtime_ns for path in output.glob("loop.seed=[12]/*")}
    (output / "broken").unlink()
    assert run(output, "loop.seed=13,1,14,2") == 0
    assert set(states(output).values()) == {"done"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert starts(output, "loop.seed=13") == 2
    assert len(Record.read(output / "loop.seed=14").spans) == 2  # type: ignore[union-attr]


@pytest.mark.usefixtures("quick")
def test_trials_are_a_group_of_their_tracker(tmp_path: Path) -> None:
    """With one of their own each; a sweep without a tracker has nothing to name."""
    assert run(tmp_path / "tracked", "loop.seed=1,2", "track=wandb", "track.mode=offline") == 0
    assert run(tmp_path / "untracked", "loop.seed=1,2") == 0
    for seed in (1, 2):
        told = json.loads((tmp_path / "tracked" / f"loop.seed={seed}" / "told.json").read_text())
        assert {"track.group='tracked'", f"track.name='loop.seed={seed}'"} <= {*told}
        told = (tmp_path / "untracked" / f"loop.seed={seed}" / "told.json").read_text()
        assert "track" not in told.replace("untracked", "")


@pytest.mark.usefixtures("quick")
def test_the_sweeper_gets_what_evaluation_json_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[float] = []
    launcher = Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    ]
    launch = launcher.launch

    def recording(self: Any, *args: Any, **more: Any) -> Any:
        jobs = launch(self, *args, **more)
        returned.extend(job.return_value for job in jobs)
        return jobs

    monkeypatch.setattr(launcher, "launch", recording)
    output = tmp_path / "sweep"
    output.mkdir()
    (output / "broken").touch()
    assert run(output, "optim.lr=1e-4,1e-3", "loop.seed=42,13") == 1
    expected = [
        json.loads((output / f"optim.lr={lr}_loop.seed=42/evaluation.json").read_text())
        for lr in ("0.0001", "0.001")
    ]
    nlls = [figures["tuned"]["nll"] for figures in expected]
    assert returned == [nlls[0], math.inf, nlls[1], math.inf]
    best = trials(output)[0]
    assert (best["name"], best["holdout_nll"]) == ("optim.lr=0.001_loop.seed=42", nlls[1])


SEARCH = (
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=5",
    "hydra.sweeper.n_jobs=1",
    "hydra.sweeper.sampler.seed=0",
    "optim.lr=tag(log,interval(1e-5,1e-2))",
    "loop.seed=1,13",
)


@pytest.mark.usefixtures("quick")
def test_optuna_goes_on_past_a_failure_and_repeats_itself(tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    output.mkdir()
    (output / "broken").touch()
    assert run(output, *SEARCH) == 1
    first = states(output)
    assert set(first.values()) == {"done", "failed"}
    best = yaml.safe_load((output / "optimization_results.yaml").read_text())
    assert best["best_value"] == trials(output)[0]["holdout_nll"]
    assert best["best_params"]["loop.seed"] == 1
    (output / "broken").unlink()
    started = pids(output)
    assert run(output, *SEARCH) == 0
    # The same suggestions as far as the values are the same: nothing that was done ran again.
    for name, state in first.items():
        assert starts(output, name) == 1 or state == "failed"
    assert len(pids(output)) > len(started)


def test_a_killed_sweep_leaves_no_process_and_goes_on(
    tmp_path: Path, started: Callable[..., BaseProcess]
) -> None:
    output = tmp_path / "sweep"
    more = ("optim.lr=1e-4,1e-3", "loop.max_steps=10", "loop.epochs=0.1")
    sweep = started(output, *more)
    metrics = output / "optim.lr=0.001" / "metrics.jsonl"
    eventually("the second trial is under way", metrics.exists)
    sweep.kill()
    sweep.join(WAIT_S)
    eventually("no trial survives", lambda: not any(map(is_alive, pids(output))))
    assert states(output) == {"optim.lr=0.0001": "done", "optim.lr=0.001": "running"}
    lines = metrics.read_text().splitlines()
    again = started(output, *more, "track=none")
    again.join(WAIT_S)
    assert again.exitcode == 0, (tmp_path / "said").read_text()
    assert metrics.read_text().splitlines()[: len(lines)] == lines
    assert set(states(output).values()) == {"done"}
    assert (starts(output, "optim.lr=0.0001"), starts(output, "optim.lr=0.001")) == (1, 2)


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGHUP", 143)])
def test_a_signal_lets_trials_save_and_ends_the_sweep(
    tmp_path: Path, started: Callable[..., BaseProcess], sent: str, code: int
) -> None:
    output = tmp_path / "sweep"
    more = ("optim.lr=1e-4,1e-3,1e-2", "loop.epochs=0.1", "loop.max_steps=300")
    places = ("sweep.parallel=cards", "launch.processes=2") if sent == "SIGINT" else ()
    sweep = started(output, *more, *places)
    running = 2 if places else 1
    eventually("trials run", lambda: len(list(output.glob("*/metrics.jsonl"))) == running)
    for _ in range(2):  # an impatient finger
        os.kill(sweep.pid or 0, getattr(signal, sent))
    sweep.join(WAIT_S)
    assert sweep.exitcode == code
    assert list(states(output).values()) == ["interrupted"] * running
    assert [record.exit_code for record in records(output)] == [code] * running
    assert not any(map(is_alive, pids(output)))
    assert f"{running} interrupted" in (output / "sweep.md").read_text()


@pytest.mark.usefixtures("quick")
def test_cards_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials at a time, each with its card, or its cores; a place is used again."""
    monkeypatch.setattr(cards, "ask", lambda question: 2)
    output, more = tmp_path / "gpus", ("optim.lr=1e-5,1e-4,1e-3,1e-2", "loop.epochs=0.2")
    assert run(output, *more, "sweep.parallel=cards") == 0
    told = [file.read_text().split() for file in sorted(output.glob("*/starts"))]
    assert {words[2] for words in told} == {"0", "1"}
    assert _most_at_once(output) == 2
    monkeypatch.setattr(cards, "ask", lambda question: None)
    output = tmp_path / "cpu"
    assert run(output, *more, "sweep.parallel=cards", "launch.processes=2") == 0
    cores = {file.read_text().split()[1] for file in output.glob("*/starts")}
    if len(os.sched_getaffinity(0)) > 1:
        first, second = (set(one.split(",")) for one in cores)
        assert not first & second
    assert _most_at_once(output) == 2
    assert Record.read(output / "optim.lr=0.001").settings["launch"]["processes"] is None  # type: ignore[union-attr]


def _most_at_once(output: Path) -> int:
    spans = [tuple(record.spans[0]) for record in records(output)]
    return max(sum(one <= start < end for one, end in spans) for start, _ in spans)


@pytest.mark.usefixtures("quick")
def test_optuna_uses_the_cards(tmp_path: Path) -> None:
    places = ("sweep.parallel=cards", "launch.processes=2", "loop.epochs=0.2")
    assert (
        run(tmp_path / "sweep", *SEARCH[:1], *SEARCH[3:5], "hydra.sweeper.n_trials=4", *places) == 0
    )
    assert _most_at_once(tmp_path / "sweep") == 2


@pytest.mark.usefixtures("quick")
def test_a_hopeless_trial_is_pruned(tmp_path: Path) -> None:
    """By what is held out, which is measured on the way."""
    rates = "optim.lr=1e-3,2e-3,5e-4,1"
    prune = ("sweep.prune=median", "loop.max_steps=40", "loop.eval_every=2")
    output = tmp_path / "sweep"
    assert run(output, rates, *prune) == 0
    pruned = Record.read(output / "optim.lr=1")
    assert pruned is not None
    assert pruned.state == "pruned"
    step = int(pruned.reason.split()[-1])
    assert 0.3 * 40 <= step < 40
    assert pruned.value is not None
    assert pruned.value > 5
    assert f"pruned: after step {step}" in (output / "sweep.md").read_text()
    assert run(output, rates, *prune) == 0
    assert starts(output, "optim.lr=1") == 1  # it counts as finished
