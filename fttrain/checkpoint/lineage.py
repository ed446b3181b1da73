"""The lineage of a run: the snapshots that its state comes from.

A run that resumes from one of its own earlier snapshots leaves the lineage of the later ones. They
are deleted once the new lineage has saved; until then a restart of the run must not take them for
the newest, so they are set aside before the first step. A note says which launcher started the run
that branched off: a launcher that restarts its ranks is the same, the user's next command is not.

    checkpoints/
        .left_step_00000200/         a snapshot of the lineage that was left, whole as it was
        .branch_HOST                 pid of the launcher, its start (s since 1970), the step at
                                     which the lineage branched off
"""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import psutil

from fttrain.checkpoint.snapshot import LEFT, later_than
from fttrain.util import atomic_files
from fttrain.util.atomic_files import write_text
from fttrain.util.errors import UserError

CLOCK_S = 2.0  # the start of a process may seem to move by this when the clock is set


def branch_off(checkpoints: Path, step: int) -> None:
    """Set the snapshots of later steps than ``step`` aside, and note the launcher of this run. One
    rank of each node calls it.

    Raises UserError where the disk refuses.
    """
    try:
        atomic_files.make_folder(checkpoints)
        for path in later_than(checkpoints, step):
            with contextlib.suppress(FileNotFoundError):  # another node that shares the folder
                _set_aside(path)
        write_text(_note(checkpoints), json.dumps([*_launcher(), step]))
    except OSError as error:
        raise UserError(
            f"{checkpoints}: later checkpoints cannot be set aside ({error.strerror}): another "
            "output= starts from the same checkpoint"
        ) from error


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{LEFT}{path.name}")
    try:
        path.rename(aside)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(aside)  # of a lineage that was left before
        path.rename(aside)


def branched_at(checkpoints: Path) -> int | None:
    """The step at which an earlier start by the same launcher has called ``branch_off`` on this
    node; None where there was none.
    """
    try:
        pid, since_s, step = json.loads(_note(checkpoints).read_text())
    except (OSError, ValueError):
        return None
    launcher_pid, launcher_since_s = _launcher()
    return int(step) if pid == launcher_pid and abs(since_s - launcher_since_s) < CLOCK_S else None


def _note(checkpoints: Path) -> Path:
    # Nodes may share the folder.
    return checkpoints / f".branch_{os.uname().nodename}"


def _launcher() -> tuple[int, float]:
    """The pid of the process that started this one, and its start in s since 1970."""
    pid = os.getppid()
    try:
        return pid, psutil.Process(pid).create_time()
    except psutil.Error:  # it is outside this container, or another user's
        return pid, 0.0
