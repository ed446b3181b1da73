"""Tests side by side in several processes, but for those marked ``alone``: while one of these runs,
no other test does.

A test holds the lock shared, one that is alone holds it exclusively. Whoever waits for the lock
holds the queue: without it, one that wants to be alone would wait until the others have none left.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(run: str, alone: bool) -> Iterator[None]:
    """The time of one test; ``run`` names the processes that share the machine."""
    folder = Path(tempfile.gettempdir())
    with (folder / f"fttrain-{run}.queue").open("w") as queue:
        lock = os.open(folder / f"fttrain-{run}.lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(queue, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(queue, fcntl.LOCK_UN)
            yield
        finally:
            os.close(lock)
