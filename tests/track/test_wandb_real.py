"""The real wandb, offline and against servers of its protocol: what is in a run that was stopped
and went on, and that nothing which fails keeps the process from ending.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_wandb import Log, Server, logs

from fttrain.track.wandb import run_id

SECRET = "hf_" + "s3cret" * 5
RUN = """
import json, sys
from pathlib import Path
from fttrain.launcher.environment import set_library_variables
from fttrain.track import Table, TrackConfig, open_trackers, read_results
set_library_variables()
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
first, last, exit_code = map(int, sys.argv[3:])
config = TrackConfig("wandb", **settings)
trackers = open_trackers(config, folder, 9, first, {"optim": {"lr": 2e-4}})
links = {"links": Table(("", "nccl"), [["all_reduce, bus GB/s at best", "11.2"]])}
trackers.show(first, lambda: read_results(folder, first, links))
for step in range(first + 1, last + 1):
    trackers.log(step, {"loss": 1 / step, "tokens_per_s": 100.0 * step, "bad": float("nan")})
trackers.show(last, lambda: read_results(folder, last, links))
trackers.exit_code = exit_code
trackers.finish()
"""
SHORT = """
import signal, sys, time
from pathlib import Path
import psutil
from fttrain.track import TrackConfig
from fttrain.track.wandb import SERVICE, open_wandb
from fttrain.launcher.environment import set_library_variables
set_library_variables()
folder, mode, finish_s, fault = sys.argv[1:]
tracker = open_wandb(TrackConfig("wandb", mode=mode), folder, {}, finish_s=float(finish_s))
tracker.log(1, {"loss": 1.0})
if fault:
    deadline = time.monotonic() + 60
    while not list(Path(folder).glob("wandb/*/run-*.wandb")):
        assert time.monotonic() < deadline, "wandb does not start"
        time.sleep(0.05)
    (service,) = (child for child in psutil.Process().children() if child.name() == SERVICE)
    service.send_signal(getattr(signal, fault))
    tracker.log(2, {"loss": 0.5})
tracker.finish()
print("trained to the end")
"""


def run(
    program: str, folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    home = {"HOME": str(folder.parent), "NETRC": str(folder.parent / "none")}
    return subprocess.run(
        [sys.executable, "-c", program, str(folder), *arguments],
        env={**clean, **home, "PLANTED_TOKEN": SECRET, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,  # only a guard: nothing may keep the process from ending
        check=False,
    )


def online(address: str) -> dict[str, str]:
    return {"WANDB_BASE_URL": address, "WANDB_API_KEY": "x" * 40}


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def command(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The one that uploads, as a shell takes it."""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  wandb sync ")]
    return shlex.split(line)


def table(folder: Path, log: Log, name: str) -> dict[str, Any]:
    """The newest of its name, from the file that the run refers to."""
    path = f"files/{log.summary[f'{name}.path']}"
    (file,) = folder.glob(f"wandb/offline-run-*/{path}")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def evaluated(folder: Path, after: str = "") -> None:
    """evaluation.json of a base, and once there is an ``after`` of the tuned model."""
    sample = {"prompt": "why?", "reference": "so", "before": "hm", "after": after}
    figures = {
        "base": {"nll": 4.5},
        "tuned": {"nll": 3.25} if after else None,
        "history": [{"step": 0, "nll": 4.5}] + ([{"step": 6, "nll": 3.25}] if after else []),
        "samples": [sample],
    }
    (folder / "evaluation.json").write_text(json.dumps(figures))


def test_a_run_that_was_stopped_and_went_on_offline(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    evaluated(folder)
    named = {"name": "trial 7", "group": "sweep 1", "tags": ["a", "b"], "entity": "team"}
    settings = json.dumps({**named, "notes": f"with {SECRET}"})
    first = run(RUN, folder, settings, "0", "5", "143")
    assert (first.returncode, first.stderr) == (0, "")
    evaluated(folder, after="because")
    second = run(RUN, folder, settings, "3", "6", "0")
    assert (second.returncode, second.stderr) == (0, "")

    one, two = logs(folder)
    for log in (one, two):
        assert log.run.run_id == run_id(folder), "both are one run"
        assert (log.run.display_name, log.run.run_group) == ("trial 7", "sweep 1")
        assert (list(log.run.tags), log.run.entity) == (["a", "b"], "team")
        assert log.run.notes == "with [redacted]"
        assert log.config["optim"]["lr"] == pytest.approx(2e-4)
        assert log.metrics == {"step": "", "*": "step"}, (
            "charts are drawn over the optimizer's step"
        )
        assert "proc.memory.rssMB" in log.stats, "wandb's own figures of the system"
    assert one.exit_code == 143, "shown as failed"
    assert two.exit_code == 0
    assert one.rows("loss") == [(step, 1 / step) for step in range(1, 6)]
    assert two.rows("loss") == [(step, 1 / step) for step in range(4, 7)], "from the snapshot on"
    assert one.rows("holdout_nll") == [(0, 4.5)]
    assert two.rows("holdout_nll")[-1] == (6, 3.25)
    samples = table(folder, two, "samples")
    assert samples["columns"] == ["prompt", "reference", "before", "after"]
    assert samples["data"] == [["why?", "so", "hm", "because"]]
    assert table(folder, two, "links")["data"] == [["all_reduce, bus GB/s at best", "11.2"]]
    assert two.summary["tokens_per_s_median"] == 350.0
    assert two.summary["holdout_nll_best"] == two.summary["holdout_nll_last"] == 3.25
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
            assert b"PLANTED_TOKEN" not in path.read_bytes(), path

    upload = command(second)
    assert [Path(part).name for part in upload[2:]] == sorted(
        path.name for path in folder.glob("wandb/offline-run-*")
    ), "both starts, in their order"
    wandb = str(Path(sys.executable).with_name("wandb"))
    environment = {**os.environ, **online(server.address), "HOME": str(tmp_path)}
    subprocess.run([wandb, *upload[1:]], env=environment, capture_output=True, check=True)
    (history,) = server.history.values()
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    assert losses == one.rows("loss") + two.rows("loss")
    counted = [row["_step"] for row in history]
    assert counted == sorted(set(counted)), "none is dropped as one that wandb has had"
    assert server.exit_codes == [143, 0]


def test_online_and_a_server_that_stops_answering(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "run"
    done = run(SHORT, folder, "online", "60", "", **online(server.address))
    assert (done.returncode, done.stderr) == (0, "")
    address = f"wandb: {server.address}/somebody/fttrain/runs/{run_id(folder)}"
    assert done.stdout.splitlines() == [address, "trained to the end"]
    server.stalls = True
    again = tmp_path / "again"
    done = run(SHORT, again, "online", "8", "SIGCONT", **online(server.address))
    assert (done.returncode, done.stderr) == (0, "")
    assert "wandb: the server did not take all in time; this uploads it:" in done.stdout
    (part,) = command(done)[2:]
    (file,) = Path(part).glob("run-*.wandb")
    assert Log(file).rows("loss") == [(1, 1.0), (2, 0.5)]
    assert server.history[run_id(again)] == []


def test_a_server_that_never_answers_means_offline(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = run(SHORT, tmp_path / "run", "online", "12", "", **online(address))
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("warning: wandb cannot reach its server and logs offline")
    assert "wandb: logged offline; this uploads it:" in done.stdout
    (part,) = command(done)[2:]
    (file,) = Path(part).glob("run-*.wandb")
    assert Log(file).rows("loss") == [(1, 1.0)]


def test_a_server_that_answers_with_errors_means_offline_for_that_start(
    tmp_path: Path, server: Server
) -> None:
    server.status = 403
    done = run(SHORT, tmp_path / "run", "online", "12", "", **online(server.address))
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("warning: wandb cannot reach its server and logs offline")
    (part,) = command(done)[2:]
    assert Path(part).name.startswith("offline-run-")
    server.status = 200
    again = run(SHORT, tmp_path / "run", "online", "60", "", **online(server.address))
    assert (again.returncode, again.stderr) == (0, "")
    assert "wandb: earlier steps were logged offline; this uploads it:" in again.stdout
    assert command(again)[2:] == [part]


@pytest.mark.parametrize(
    ("fault", "warning"),
    [
        ("SIGSTOP", "warning: wandb did not finish within 5 s and was left behind"),
        ("SIGKILL", "warning: wandb failed and is off from here"),
    ],
)
def test_wandb_s_own_process_hangs_or_dies(fault: str, warning: str, tmp_path: Path) -> None:
    """It is asked at the end of ours whether it has ended; a stopped one would never answer."""
    done = run(SHORT, tmp_path / "run", "offline", "5", fault)
    assert done.returncode == 0, done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith(warning)
    assert Path(command(done)[2]).is_dir()
    assert done.stdout.splitlines()[-1] == "trained to the end"
