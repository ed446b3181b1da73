"""The user's stop signals, passed to the trials through a file in the sweep's folder. Trials may
run in this process, in others, or on another machine that shares the folder.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fttrain.checkpoint.output_lock import LOCK
from fttrain.launcher.launch import Stops, handlers
from fttrain.util.locks import is_locked

FILE = ".stop"


@contextmanager
def forward_signals(folder: Path) -> Iterator[Stops]:
    """Write stop signals to the file for the length of the block, instead of being interrupted.

    The first signal asks the trials to save and stop, the second repeats that, the third kills.
    """
    path = folder / FILE
    path.unlink(missing_ok=True)  # of an earlier sweep

    def record(signum: int) -> None:
        first = not path.exists()
        with path.open("a") as file:
            file.write(f"{int(signum)}\n")
        if first:
            name = signal.Signals(signum).name
            text = f"\n{name}: trials save and stop; the same command goes on from there\n"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, text.encode())

    stops = Stops(record)
    try:
        with handlers(stops.receive):
            yield stops
    finally:
        path.unlink(missing_ok=True)


def asked(folder: Path) -> list[int]:
    """The stop signals so far, in order; trials pass them on to their runs."""
    try:
        return [int(line) for line in (folder / FILE).read_text().split()]
    except (OSError, ValueError):
        return []


def abandoned(folder: Path, host: str) -> bool:
    """Whether the process that runs the search has died.

    It holds a lock on the folder, which only processes on its own machine can test; False
    elsewhere.
    """
    if os.uname().nodename != host:
        return False
    try:
        return not is_locked(folder / LOCK)
    except OSError:
        return False
