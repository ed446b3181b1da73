"""Trials that really train, on a tiny model: what they leave, the best one again, kills."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tiny_run import WAIT_S, arguments, inputs, losses
from tiny_sweep import eventually

from fttrain.cli import main
from fttrain.config.run_config import compose
from fttrain.launcher.environment import PARENT_PID
from fttrain.sweep.record import records
from fttrain.sweep.trial import identity
from fttrain.util.paths import launch_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, and a data set."""
    return inputs(tmp_path_factory)


def sweep(folder: Path, output: Path, *more: str) -> list[str]:
    command, *rest = arguments(folder, output, *more)
    return [command, "-m", *rest]


def test_a_crash_is_tried_again_and_the_best_trains_once_more(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model that is not there is a mistake that only the run itself finds."""
    output, other = tmp_path / "sweep", tmp_path / "other"
    axis = f"model.path={folder / 'model'},{other}"
    more = (axis, "loop.max_steps=3", "loop.samples=0", "track=none")
    assert main(sweep(folder, output, *more)) == 1
    done, failed = sorted(records(output), key=lambda record: record.state)
    assert (done.state, failed.state) == ("done", "failed")
    assert str(other) in failed.reason
    assert "Traceback" not in (output / failed.name / "train.log").read_text()
    assert f"fttrain: error: {failed.reason}" in (output / failed.name / "train.log").read_text()
    figures = json.loads((output / done.name / "evaluation.json").read_text())
    assert figures["tuned"]["nll"] == done.value
    kept = {path: path.stat().st_mtime_ns for path in (output / done.name).rglob("*")}

    shutil.copytree(folder / "model", other)
    assert main(sweep(folder, output, *more)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [record.value for record in records(output)] == [done.value] * 2  # the same base

    best = output / "experiment" / "best.yaml"
    assert identity(compose([f"experiment={best}"])) == done.settings
    again = tmp_path / "again"
    assert main(["train", f"experiment={best}", f"output={again}"]) == 0
    tuned = json.loads((again / "evaluation.json").read_text())["tuned"]
    assert tuned["nll"] == done.value
    capfd.readouterr()
    assert main(sweep(folder, output, *more, "lora.r=5")) == 2
    assert "lora.r was 4 there and is 5 now" in capfd.readouterr().err


def test_ranks_of_a_trial_die_with_the_sweep(
    folder: Path, tmp_path: Path, started: Callable[..., BaseProcess]
) -> None:
    """SIGKILL leaves neither the launcher of the trial nor its ranks."""
    output = tmp_path / "sweep"
    more = ("optim.lr=1e-3,1e-2", "launch=cpu_demo", "loop.max_steps=5000", "loop.epochs=5000")
    command, *rest = sweep(folder, output, *more)
    process = started(output, *rest[1:], base=(command, "-m"))
    metrics = output / "optim.lr=0.001" / "metrics.jsonl"
    eventually("two ranks train", lambda: losses(metrics.parent))
    assert len(_running(output)) == 3  # the trial's launcher and two ranks
    process.kill()
    eventually("none is left", lambda: not _running(output))


def _running(output: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            named = str(output).encode() in path.read_bytes()
        except OSError:
            continue
        found += [int(path.parent.name)] if named else []
    return found


def test_a_rank_says_how_a_sweep_is_started() -> None:
    module = [sys.executable, "-m", "accelerate.commands.launch"]
    file = str(launch_folder() / "cpu_demo.yaml")
    command = [*module, "--config_file", file, "-m", "fttrain", "train", "-m", "lora.r=8,16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("fttrain: error:")]
    assert len(said) == 1
    assert said[0].endswith("write: fttrain train -m launch.processes=2 lora.r=8,16")


def test_a_trial_takes_a_stop_that_its_starter_held_back() -> None:
    program = (
        "import os, signal, sys; from fttrain import cli;"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]);"
        f"os.environ[{PARENT_PID!r}] = str(os.getppid()); cli.main(['--version']);"
        "sys.exit(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.slow
@pytest.mark.ray
def test_ray_runs_trials(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    more = ("lora.r=range(4,5)", "loop.max_steps=2", "loop.samples=0", "hydra/launcher=ray")
    assert main(sweep(folder, output, *more)) == 0
    for record in records(output):
        figures = json.loads((output / record.name / "evaluation.json").read_text())
        assert figures["tuned"]["nll"] == record.value
    assert len(records(output)) == 1
