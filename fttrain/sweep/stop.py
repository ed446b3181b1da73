"""The user's wish to stop, told to the trials through a file of the sweep's folder: they may run
in this process, in others, or on another machine that sees the folder.
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
def telling(folder: Path) -> Iterator[Stops]:
    """Within, signals that mean stop are written down for the trials, and nothing is interrupted:
    the first asks them to save, a later one repeats it, the third kills.
    """
    path = folder / FILE
    path.unlink(missing_ok=True)  # of an earlier sweep

    def tell(signum: int) -> None:
        first = not path.exists()
        with path.open("a") as file:
            file.write(f"{int(signum)}\n")
        if first:
            name = signal.Signals(signum).name
            text = f"\n{name}: trials save and stop; the same command goes on from there\n"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, text.encode())

    stops = Stops(tell)
    try:
        with handlers(stops.receive):
            yield stops
    finally:
        path.unlink(missing_ok=True)


def asked(folder: Path) -> list[int]:
    """The signals that trials have to pass on to their runs so far, the first first."""
    try:
        return [int(line) for line in (folder / FILE).read_text().split()]
    except (OSError, ValueError):
        return []


def abandoned(folder: Path, host: str) -> bool:
    """Whether the process that runs the search has died, as far as can be seen from here: its
    claim of the folder is a lock, which only processes of its own machine can try.
    """
    if os.uname().nodename != host:
        return False
    try:
        return not is_locked(folder / LOCK)
    except OSError:
        return False
