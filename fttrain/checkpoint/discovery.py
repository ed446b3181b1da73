"""The snapshot that a run goes on from, on every rank, whichever machine has its files.

Machines need not share files, and after a restart they may be numbered anew: then the machine that
had rank 0, and wrote, is another one. So each looks, the one with the most steps reads, and the
others get what it read, tensor by tensor.
"""

import json
import os
from pathlib import Path

from fttrain.checkpoint.lineage import branched_at
from fttrain.checkpoint.snapshot import (
    WORDS,
    Snapshot,
    find_snapshot,
    load_snapshot,
    put_together,
    state_of,
    step_of,
)
from fttrain.distributed.rank_group import RankGroup
from fttrain.util.errors import UserError


def snapshot_to_resume(
    checkpoints: Path, resume: str, group: RankGroup, again: bool
) -> tuple[str, Snapshot] | None:
    """As ``newest_snapshot``; of a run that its launcher has started ``again`` the newest that it
    has left, on the course that ``resume`` began. Every rank calls it.
    """
    begun = _begun_anywhere(checkpoints, resume, group) if again else None
    if begun is not None:
        found = newest_snapshot(checkpoints, "auto", group)
        if found is not None and found[1].step >= begun:
            return found
    return newest_snapshot(checkpoints, resume, group)


def _begun_anywhere(checkpoints: Path, resume: str, group: RankGroup) -> int | None:
    """The step from which on snapshots are of the course that ``resume`` began, on whichever
    machine knows it; None where no start of this launcher has come so far.
    """
    own = -1 if resume in WORDS else None
    if own is None and group.intra_node.is_main:
        own = branched_at(checkpoints)
    known = max(step for (step,) in group.gather([-2.0 if own is None else float(own)]))
    return None if known == -2 else int(known)


def newest_snapshot(
    checkpoints: Path | str, resume: str, group: RankGroup
) -> tuple[str, Snapshot] | None:
    """Where it is, for people, and what is in it; None to start afresh. Every rank calls it.

    ``resume``: auto, none or a path. Raises UserError, on every rank, where no machine has what it
    asks for and one says why, or where it cannot be read.
    """
    path, problem = None, ""
    if group.intra_node.is_main:
        try:
            path = find_snapshot(checkpoints, resume)
        except UserError as error:
            problem = str(error)
    steps = [step for (step,) in group.gather([-1.0 if path is None else float(step_of(path))])]
    if max(steps) < 0:
        group.raise_everywhere(problem)
        return None
    reader = steps.index(max(steps))  # of equals the first
    return _read(path if group.rank == reader else None, group, reader)


def _read(path: Path | None, group: RankGroup, reader: int) -> tuple[str, Snapshot]:
    """``path``: on the rank ``reader``, which reads it for all."""
    found, problem, where = None, "", ""
    try:
        if path is not None:
            found = load_snapshot(path)
            where = str(path) if group.is_main else f"{path} on {os.uname().nodename}"
    except UserError as error:
        problem = str(error)
    group.raise_everywhere(problem)
    state = json.loads(group.broadcast_str(json.dumps(state_of(found) if found else None), reader))
    adapter, optimizer = (
        dict(group.broadcast_tensors(tensors, reader))
        for tensors in ((found.adapter, found.optimizer) if found else ({}, {}))
    )
    return group.broadcast_str(where, reader), put_together(state, adapter, optimizer)
