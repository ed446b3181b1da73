"""Locks between processes: a file that the kernel unlocks when its holder ends, however it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def try_lock(path: Path, wait_s: float = 0.0) -> FileLock | None:
    """The lock of the file ``path``, held; None where another process still holds it after
    ``wait_s`` seconds. ``release()`` frees it; the file stays.

    Raises OSError where the file cannot be made.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        return None
    return lock


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock of the file ``path`` and hold it for the length of the block.

    Raises OSError where the file cannot be made.
    """
    with FileLock(path, thread_local=False):
        yield


def is_locked(path: Path) -> bool:
    """Whether a process of this machine holds the lock of ``path``.

    The lock is held for a moment to find out, so ``try_lock`` waits a little before it gives up.
    """
    lock = try_lock(path)
    if lock is None:
        return True
    lock.release()
    return False
