"""Deaths and failures of a rank in whole programs: under the launcher, and in a training run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import tiny_files
from tiny_run import WAIT_S, Fault, arguments, exit_codes, two_ranks

from fttrain.distributed.peer_watchdog import DIED_EXIT_CODE
from fttrain.launcher import launch

# A rank with the real command line: argv[1] is what rank 1 does while rank 0 waits for it.
RANK = """
import os, signal, sys
import torch
from fttrain import cli
from fttrain.distributed.process_group import process_group
from fttrain.util.errors import UserError
def command(_arguments):
    with process_group(torch.device("cpu")) as group:
        group.barrier()
        if group.rank == 1:
            exec(sys.argv[1])
        group.barrier()
    return 0
cli._dispatch = command
sys.exit(cli.main([]))
"""
LAUNCHER = """
import os, sys
from fttrain.launcher import launch
from fttrain.launcher.environment import PARENT_PID
port = str(launch.free_port())
fixed = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
fixed[PARENT_PID] = str(os.getpid())
command = [sys.executable, *sys.argv[1:]]
sys.exit(launch.supervise([(command, {**fixed, "RANK": rank}) for rank in "01"]))
"""


@pytest.mark.parametrize(
    ("deed", "code", "messages"),
    [
        ("raise UserError('the disk is full', 7)", 7, ["rank 1: the disk is full"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ["rank 1 (pid", "rank 1 was killed by SIG"]),
    ],
    ids=["fails", "dies"],
)
def test_under_the_launcher(deed: str, code: int, messages: list[str], tmp_path: Path) -> None:
    """The code is that of the rank that was to blame, and each line comes once."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path / "rank.py"), deed]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=environment)
    assert done.returncode == code, done.stderr
    lines = sorted(line for line in done.stderr.splitlines() if "error" in line)
    starts = [f"fttrain: error: {message}" for message in messages]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_a_killed_rank_is_to_blame_before_one_that_ended_with_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both are found at one look."""
    monkeypatch.setattr(launch, "POLL_S", 2.0)
    programs = (f"raise SystemExit({DIED_EXIT_CODE})", "import os; os.kill(os.getpid(), 9)")
    ranks = [([sys.executable, "-c", program], dict(os.environ)) for program in programs]
    assert launch.supervise(ranks) == 137
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., list[int | None]]]:
    """Trains on two ranks that no launcher watches, until both have ended; their exit codes."""
    with two_ranks() as start:
        yield lambda argv, fault=None: exit_codes(start(argv, fault, tmp_path))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_run_ends_with_the_name_of_the_dead_rank_and_goes_on(
    victim: int, tmp_path: Path, train: Callable[..., list[int | None]]
) -> None:
    tiny_files.save(tiny.model(num_hidden_layers=2), tmp_path / "model")
    tiny_files.write_data(tmp_path / "data.jsonl")
    argv = arguments(tmp_path, tmp_path / "run", "loop.max_steps=6", "checkpoint.every=2")
    codes = train(argv, Fault(victim, 3, signal.SIGKILL))
    other = 1 - victim
    said = (tmp_path / f"stderr{other}").read_text()
    assert (codes[victim], codes[other]) == (-signal.SIGKILL, DIED_EXIT_CODE), said
    where = f"rank {other}: " if other else ""
    assert f"fttrain: error: {where}rank {victim} (pid " in said
    assert "Traceback" not in said
    assert train(argv) == [0, 0]
