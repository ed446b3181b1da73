"""Sweeps whose trials are quick, and what tests look at."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fttrain.cli import main
from fttrain.sweep import child, trial, watch

QUICK = (sys.executable, str(Path(__file__).parents[1] / "sweep" / "quick_train.py"))
WAIT_S = 120
BASE = ("train", "-m", "model=smollm2_135m", "loop.max_steps=4")


def hurry(put: Callable[[object, str, object], None]) -> None:
    """Trials of this process are quick, and looked at often."""
    put(child, "PROGRAM", QUICK)
    put(trial, "LOOK_S", 0.05)
    put(trial, "POLL_S", 0.01)
    put(watch, "LOOK_S", 0.05)


def run(output: Path, *more: str) -> int:
    """A sweep in this process."""
    return main([*BASE, f"output={output}", *more])


def sweep_main(argv: list[str], said: Path, quick: bool) -> None:
    """A sweep in a process of its own; ``said``: the file for what it prints."""
    descriptor = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setsid()
    if quick:
        hurry(setattr)
    sys.exit(main(argv))


def eventually(what: str, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def pids(output: Path) -> list[int]:
    """Of all trials that were ever started."""
    files = sorted(output.glob("*/starts"))
    return [int(line.split()[0]) for file in files for line in file.read_text().splitlines()]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
