"""The snapshot that a run resumes from: the choice, and how every rank gets it.

Nodes need not share files, and after a restart by the launcher they may be numbered anew: the node
that had rank 0, and wrote, may be another one now. So each node looks, the one with the most steps
reads, and the others receive its tensors one by one.
"""

import json
import os
from pathlib import Path

from fttrain.checkpoint.lineage import branched_at
from fttrain.checkpoint.snapshot import (
    FORM,
    Snapshot,
    assemble,
    load_snapshot,
    newest_first,
    state_of,
    step_of,
)
from fttrain.distributed.rank_group import RankGroup
from fttrain.util.errors import UserError
from fttrain.util.manifest import fault
from fttrain.util.warn import Warn, warn

AUTO, NONE = "auto", "none"  # values of ``resume`` beside the path of a snapshot


def snapshot_to_resume(
    checkpoints: Path, resume: str, group: RankGroup, restarted: bool
) -> tuple[str, Snapshot] | None:
    """The snapshot that a run resumes from, with its path for people to read; None to start afresh.
    Every rank calls it and gets the same. This is the rule, and nothing else decides:

    - ``resume=none``: none.
    - ``resume=PATH``: that snapshot, if it is whole.
    - ``resume=auto``: the newest whole snapshot in ``checkpoints`` on any node; none where there is
      no snapshot.
    - ``restarted``, that is, the launcher has started the ranks again after a failure: as with
      ``auto``, whatever ``resume`` says. With ``resume=PATH`` an earlier start must have come as
      far as to branch off from PATH, and an older snapshot than PATH is not taken.

    Raises UserError, on every rank, where no node has a whole snapshot of the kind and one says
    why, or where it cannot be read.
    """
    begun = _begun_step(checkpoints, resume, group) if restarted else None
    if begun is not None:
        snapshot = newest_snapshot(checkpoints, AUTO, group)
        if snapshot is not None and snapshot[1].step >= begun:
            return snapshot
    return newest_snapshot(checkpoints, resume, group)


def branches_off(resume: str) -> bool:
    """Whether a run with this ``resume`` leaves the snapshots of later steps behind."""
    return resume not in (AUTO, NONE)


def find_snapshot(checkpoints: Path | str, resume: str, warn: Warn = warn) -> Path | None:
    """The folder of the snapshot that ``resume`` (auto, none or a path) names on this node, read
    and verified; None to start afresh. ``warn`` is called with the newer ones that are damaged.

    Raises:
        UserError: the path is no whole snapshot, or with auto there are snapshots and none is
            whole.
    """
    if resume == NONE:
        return None
    if resume != AUTO:
        return _whole(Path(resume))
    folders = newest_first(Path(checkpoints))
    for path in folders:
        reason = fault(path, FORM)
        if reason is None:
            return path
        warn(f"checkpoint {path} is refused: {reason}")
    if folders:
        raise UserError(
            f"{checkpoints}: none of the {len(folders)} checkpoints is whole; to start afresh "
            "give another output="
        )
    return None


def newest_snapshot(
    checkpoints: Path | str, resume: str, group: RankGroup
) -> tuple[str, Snapshot] | None:
    """The snapshot of the most steps that ``find_snapshot`` finds on any node, with its path for
    people to read; None where there is none. Every rank calls it.

    Raises UserError, on every rank, where no node has one and one says why, or where it cannot be
    read.
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


def _begun_step(checkpoints: Path, resume: str, group: RankGroup) -> int | None:
    """The step from which on snapshots are of the lineage that ``resume`` began, as any node knows
    it: -1 for any step, None where no earlier start of this launcher has branched off.
    """
    step = None if branches_off(resume) else -1
    if step is None and group.intra_node.is_main:
        step = branched_at(checkpoints)
    latest = max(value for (value,) in group.gather([-2.0 if step is None else float(step)]))
    return None if latest == -2 else int(latest)


def _whole(path: Path) -> Path:
    """``path``, which is that of a whole snapshot; UserError where it is not."""
    reason = fault(path, FORM)
    if reason is None:
        return path
    inside = [
        snapshot.name
        for folder in (path, path / "checkpoints")
        for snapshot in newest_first(folder)
    ]
    hint = f"; it holds {', '.join(inside)}: give one of these" if inside else ""
    raise UserError(f"resume={path}: not a whole checkpoint: {reason}{hint}")


def _read(path: Path | None, group: RankGroup, reader: int) -> tuple[str, Snapshot]:
    """The snapshot at ``path`` on the rank ``reader``, sent to every rank. On the other ranks
    ``path`` is None.
    """
    snapshot, problem, shown = None, "", ""
    try:
        if path is not None:
            snapshot = load_snapshot(path)
            shown = str(path) if group.is_main else f"{path} on {os.uname().nodename}"
    except UserError as error:
        problem = str(error)
    group.raise_everywhere(problem)
    text = json.dumps(state_of(snapshot) if snapshot else None)
    state = json.loads(group.broadcast_str(text, reader))
    adapter, optimizer = (
        dict(group.broadcast_tensors(tensors, reader))
        for tensors in ((snapshot.adapter, snapshot.optimizer) if snapshot else ({}, {}))
    )
    return group.broadcast_str(shown, reader), assemble(state, adapter, optimizer)
