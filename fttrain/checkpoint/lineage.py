"""Which snapshots are of the course that a run is on.

A run that was told to go on from one of its own snapshots leaves the course of the later ones. They
are deleted once the new course has saved; until then a run that is started again must not take them
for the newest, so they are set aside before the first step. A note says who started the run that
did it: of a launcher that starts its ranks again it is the same, of the user's next command not.

    checkpoints/
        .left_step_00000200/         a snapshot of the course that was left, whole as it was
        .course_HOST                 pid of the launcher, since when it runs (s since 1970), the
                                     step that the course began with
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

CLOCK_S = 2.0  # by which the start of one process may seem to move when the clock is set


def branch_off(checkpoints: Path, step: int) -> None:
    """Sets aside what was saved after ``step``, and notes who started this run. One rank of each
    machine calls it.

    Raises UserError where the disk refuses.
    """
    try:
        atomic_files.make_folder(checkpoints)
        for path in later_than(checkpoints, step):
            with contextlib.suppress(FileNotFoundError):  # another machine that shares the folder
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
        shutil.rmtree(aside)  # of a course that was left before
        path.rename(aside)


def branched_at(checkpoints: Path) -> int | None:
    """The step with which an earlier start by the same launcher has called ``branch_off`` on this
    machine; None where there was none.
    """
    try:
        pid, since_s, step = json.loads(_note(checkpoints).read_text())
    except (OSError, ValueError):
        return None
    own_pid, own_since_s = _launcher()
    return int(step) if pid == own_pid and abs(since_s - own_since_s) < CLOCK_S else None


def _note(checkpoints: Path) -> Path:
    # Machines may share the folder.
    return checkpoints / f".course_{os.uname().nodename}"


def _launcher() -> tuple[int, float]:
    pid = os.getppid()
    try:
        return pid, psutil.Process(pid).create_time()
    except psutil.Error:  # it is outside of this container, or another user's
        return pid, 0.0
