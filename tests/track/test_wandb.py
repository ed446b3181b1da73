"""Training must not notice what wandb does: here it hangs, raises, exits or is not there.

The broken ones are stand-ins for the dependency, found first on the path of a process of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fttrain.track import TrackConfig, Trackers
from fttrain.track.wandb import choose_mode, has_login
from fttrain.util.errors import UserError

STAND_IN = """
import json, os, sys, time
FAULT, PLACE = os.environ["FAULT"], os.environ["PLACE"]
def act(place):
    if place != PLACE:
        return
    if FAULT == "hang":
        time.sleep(1000)
    if FAULT == "missing":
        raise ModuleNotFoundError("No module named 'wandb'")
    if FAULT == "exit":
        sys.exit(3)
    if FAULT == "raise":
        raise RuntimeError("the server\\nis down")
def note(**what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")
act("import")
class Settings:
    def __init__(self, **settings):
        pass
class Run:
    url = "http://wandb.example/run"
    def define_metric(self, name, **how):
        act("define")
    def log(self, values):
        act("log")
        note(values=values)
    def finish(self, exit_code):
        act("finish")
        note(finished=exit_code)
def init(**settings):
    del settings["settings"]
    act("init " + settings["mode"])
    act("init")
    note(**settings)
    return Run()
def teardown():
    note(teardown=True)
"""
PROGRAM = """
import sys
from pathlib import Path
from fttrain.track import MetricsFile, TrackConfig, Trackers
from fttrain.launcher.environment import set_library_variables
from fttrain.track.wandb import open_wandb
set_library_variables()
folder = Path(sys.argv[1])
config = TrackConfig(kind="wandb", mode=sys.argv[2])
wandb = open_wandb(config, folder, {"lr": 1.0}, finish_s=float(sys.argv[4]))
trackers = Trackers([wandb, MetricsFile(folder / "metrics.jsonl")])
for step in range(1, int(sys.argv[3]) + 1):
    trackers.log(step, {"loss": 1 / step, "bad": float("nan")})
trackers.finish()
print("trained to the end")
"""


def train(
    tmp_path: Path,
    fault: str = "",
    place: str = "",
    mode: str = "auto",
    steps: int = 1500,
    **env: str,
) -> tuple[str, list[dict[str, Any]]]:
    """(standard error, what the stand-in noted) of a run beside a wandb that has ``fault``."""
    stand_in, folder, notes = tmp_path / "lib", tmp_path / "run", tmp_path / "notes"
    stand_in.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    (stand_in / "wandb.py").write_text(STAND_IN)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment = {
        **clean,
        "PYTHONPATH": str(stand_in),
        "HOME": str(tmp_path),
        "FAULT": fault,
        "PLACE": place,
        "NOTES": str(notes),
        **env,
    }
    environment.pop("NETRC", None)
    command = [sys.executable, "-c", PROGRAM, str(folder), mode, str(steps), "1" if fault else "30"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,  # only a guard: a hanging wandb must not hang the run
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained to the end"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == steps
    said = notes.read_text() if notes.exists() else ""
    return done.stderr, [json.loads(line) for line in said.splitlines()]


@pytest.mark.parametrize(
    ("fault", "place"),  # test_background.py has all pairs, with a tracker of its own
    [
        ("hang", "import"),
        ("hang", "init"),
        ("hang", "log"),
        ("missing", "import"),
        ("exit", "init"),
        ("raise", "log"),
        ("raise", "finish"),
    ],
)
def test_a_broken_wandb_costs_one_warning(fault: str, place: str, tmp_path: Path) -> None:
    told, _ = train(tmp_path, fault, place)
    reasons = {
        "hang": "did not finish within 1 s",
        "missing": "ModuleNotFoundError: No module named 'wandb'",
        "exit": "SystemExit: 3",
        "raise": "RuntimeError: the server",
    }
    lines = told.splitlines()
    assert len(lines) == 1, told
    assert lines[0].startswith("warning: wandb")
    assert reasons[fault] in lines[0]


def test_what_reaches_wandb(tmp_path: Path) -> None:
    told, notes = train(tmp_path, steps=3)
    assert told == ""
    start, *steps, end = notes
    name = (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert start == {
        "project": "fttrain",
        "entity": None,
        "name": "run",
        "group": None,
        "notes": None,
        "tags": None,
        "id": name,
        "resume": "allow",
        "mode": "offline",
        "dir": str(tmp_path / "run"),
        "config": {"lr": 1.0},
    }
    assert steps[0] == {"values": {"step": 1, "loss": 1.0, "bad": None}}
    assert [record["values"]["step"] for record in steps] == [1, 2, 3]
    assert end == {"finished": 0}
    _, again = train(tmp_path, steps=3)
    assert again[5]["id"] == name, "a resumed run is the same run there"


def test_a_server_that_cannot_be_reached_means_offline(tmp_path: Path) -> None:
    told, notes = train(tmp_path, "raise", "init online", steps=3, WANDB_API_KEY="x" * 40)
    assert "warning: wandb cannot reach its server and logs offline" in told
    assert notes[0] == {"teardown": True}
    assert notes[1]["mode"] == "offline"
    assert notes[-1] == {"finished": 0}


def test_online_without_a_login_says_so_and_goes_offline(tmp_path: Path) -> None:
    told, notes = train(tmp_path, mode="online", steps=3)
    assert told.startswith("warning: track.mode=online, but wandb has no login")
    assert notes[0]["mode"] == "offline"


def test_a_login_is_found_where_wandb_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    assert not has_login()
    assert choose_mode("auto") == choose_mode("online") == choose_mode("offline") == "offline"
    file.write_text("machine api.wandb.ai login user password 0123\n")
    file.chmod(0o600)
    assert has_login()
    assert (choose_mode("auto"), choose_mode("offline")) == ("online", "offline")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (choose_mode("auto"), choose_mode("online")) == ("disabled", "online")
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert choose_mode("auto") == "offline", "its old name"
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert not has_login()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert has_login()


def test_the_settings_name_the_bad_key() -> None:
    for changes, key in (
        ({"kind": "mlflow"}, "track.kind=mlflow"),
        ({"kind": ("wandb", "mlflow")}, "track.kind=mlflow"),
        ({"group": ""}, "track.group"),
        ({"tags": ("a", "")}, "track.tags"),
        ({"mode": "on"}, "track.mode=on"),
        ({"project": ""}, "track.project"),
    ):
        with pytest.raises(UserError, match=key):
            TrackConfig(**changes)


def test_other_ranks_track_nothing() -> None:
    nothing = Trackers()
    nothing.log(1, {"loss": 1.0})
    nothing.finish()
