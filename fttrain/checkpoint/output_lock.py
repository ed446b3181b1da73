"""The lock on a run's folder: one run at a time writes into ``output=``."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock

from fttrain.util.errors import UserError
from fttrain.util.locks import try_lock

LOCK = ".lock"
PATIENCE_S = 0.3  # a sweep's trials look for a moment whether the lock is held
# Files and folders that only a run leaves
TRACES = ("metrics.jsonl", "checkpoints", "adapter", "model", "evaluation.json")


class OutputLock:
    """The right to write into a run's folder until ``release``, a with block's end, or death."""

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    def release(self) -> None:
        """Let another run have the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def lock_output(folder: Path | str, resume: str) -> OutputLock:
    """Make the run's folder and lock it for this run; one rank calls it, before anything is written
    there.

    Args:
        folder: the run's folder.
        resume: auto, none, or the path of a snapshot.

    Raises:
        UserError: another run is writing there; or there was one, and ``resume`` would mix this run
            with it; or the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / LOCK, PATIENCE_S)
    except OSError as error:
        raise UserError(
            f"output={folder}: cannot be written to ({error.strerror}): give another output="
        ) from error
    if lock is None:
        owner = (folder / LOCK).read_text().strip() or "another process"
        raise UserError(
            f"output={folder}: {owner} is writing there: wait, stop it, or give another output="
        )
    try:
        _refuse_mixing(folder, resume)
    except UserError:
        lock.release()
        raise
    (folder / LOCK).write_text(f"process {os.getpid()} on {os.uname().nodename}\n")
    return OutputLock(lock)


def _refuse_mixing(folder: Path, resume: str) -> None:
    traces = [name for name in TRACES if (folder / name).exists()]
    if not traces or resume == "auto":
        return
    if resume == "none":
        raise UserError(
            f"output={folder}: already holds a run ({traces[0]}): resume=auto goes on with it, "
            "another output= starts afresh"
        )
    if (folder / "checkpoints").resolve() not in Path(resume).resolve().parents:
        raise UserError(
            f"output={folder}: already holds a run ({traces[0]}) and resume={resume} is of "
            "another one: resume=auto goes "
            "on with the run that is there, another output= starts one from that checkpoint"
        )
