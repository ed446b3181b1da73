"""The lock under which a frozen cache is made."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.cache import HELP
from fttrain.util import atomic_files
from fttrain.util.locks import try_lock

POLL_S = 1.0


@contextmanager
def build_lock(folder: Path, group: RankGroup) -> Iterator[None]:
    """Hold the lock of the cache in ``folder``, so that no other run builds it. Every rank of
    ``group`` enters the block.

    Ranks poll for the lock: another run may hold it for hours, longer than a collective may wait.
    Raises UserError, on every rank, where the folder cannot be written.
    """
    problem = ""
    lock: FileLock | None = None
    path = folder / ".lock"
    if group.is_main:
        try:
            atomic_files.make_folder(folder)
            lock = try_lock(path)
        except OSError as error:
            problem = f"frozen cache {folder}: cannot be made ({error.strerror}): {HELP}"
    group.raise_everywhere(problem)
    announced = False
    while group.any(group.is_main and lock is None):
        if group.is_main and not announced:
            print(f"waiting for another process that is making {folder}", flush=True)
            announced = True
        time.sleep(POLL_S)
        if group.is_main:
            lock = try_lock(path)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
