"""One folder, one run: who may write into ``output=``."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fttrain.errors import UserError

LOCK = ".lock"
TRACES = (
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "model",
    "evaluation.json",
)  # what only a run leaves


class Claim:
    """The right to write into a run's folder until ``release``, a with block's end, or death."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def release(self) -> None:
        """Lets another run have the folder."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def claim_output(folder: Path | str, resume: str) -> Claim:
    """Makes the run's folder and takes it for this run; call it on one rank before anything is
    written there.

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
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"output={folder}: cannot be written to ({error.strerror}): give another output="
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"output={folder}: {owner} is writing there: wait, stop it, or give another output="
        ) from None
    try:
        _refuse_mixing(folder, resume)
    except UserError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return Claim(file)


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
