"""Which snapshots are of the course that a run is on.

A run that was told to go on from one of its own snapshots leaves the course of the later ones. They
are deleted once the new course has saved; until then a run that is started again must not take them
for the newest, so they are set aside before the first step. A note says who started the run that
did it: of a launcher that starts its ranks again it is the same, of the user's next command not.

    checkpoints/
        .left_step_00000200/         a snapshot of the course that was left, whole as it was
        .course_HOST                 pid of the launcher, and since when it runs (s since 1970)
"""

import json
import os
from pathlib import Path

import psutil

from fttrain.checkpoint import durable
from fttrain.checkpoint.resume import LEFT, later_than
from fttrain.errors import UserError
from fttrain.files import write_text

CLOCK_S = 2.0  # by which the start of one process may seem to move when the clock is set


def leave(checkpoints: Path, step: int) -> None:
    """Sets aside what was saved after ``step``, and notes who started this run. One rank of each
    machine calls it.

    Raises UserError where the disk refuses.
    """
    try:
        durable.make_folder(checkpoints)
        for path in later_than(checkpoints, step):
            path.rename(path.with_name(f"{LEFT}{path.name}"))
        write_text(_note(checkpoints), json.dumps(_launcher()))
    except OSError as error:
        raise UserError(
            f"{checkpoints}: later checkpoints cannot be set aside ({error.strerror}): another "
            "output= starts from the same checkpoint"
        ) from error


def left_for(checkpoints: Path) -> bool:
    """Whether an earlier start by the same launcher has called ``leave`` on this machine."""
    try:
        pid, since_s = json.loads(_note(checkpoints).read_text())
    except (OSError, ValueError):
        return False
    own_pid, own_since_s = _launcher()
    return bool(pid == own_pid and abs(since_s - own_since_s) < CLOCK_S)


def _note(checkpoints: Path) -> Path:
    # Machines may share the folder.
    return checkpoints / f".course_{os.uname().nodename}"


def _launcher() -> tuple[int, float]:
    parent = psutil.Process(os.getppid())
    return parent.pid, parent.create_time()
