"""The lock under which a frozen cache is made."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fttrain.checkpoint import durable
from fttrain.checkpoint.frozen_cache import HELP
from fttrain.dist import Group

POLL_S = 1.0


@contextmanager
def alone(folder: Path, group: Group) -> Iterator[None]:
    """No other run makes this cache meanwhile. Ranks wait in small steps: another run may take
    hours.
    """
    problem, lock = "", -1
    if group.is_main:
        try:
            durable.make_folder(folder)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            problem = f"frozen cache {folder}: cannot be made ({error.strerror}): {HELP}"
    group.refuse_together(problem)
    told = False
    while not group.all(lock < 0 or _locked(lock)):
        if group.is_main and not told:
            print(f"waiting for another process that is making {folder}", flush=True)
            told = True
        time.sleep(POLL_S)
    try:
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
