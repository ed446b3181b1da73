"""Snapshots of a session: how a run is saved, and how it resumes."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fttrain.checkpoint.discovery import (
    AUTO,
    branches_off,
    find_snapshot,
    snapshot_to_resume,
)
from fttrain.checkpoint.lineage import branch_off
from fttrain.checkpoint.output_lock import lock_output
from fttrain.checkpoint.snapshot import Snapshot, save_snapshot, scalars_of
from fttrain.config.loop_config import LoopConfig
from fttrain.config.run_config import RunConfig
from fttrain.distributed.peer_watchdog import uninterruptible
from fttrain.distributed.rank_group import rank_from_environment
from fttrain.launcher.launch import restarted
from fttrain.training.session import TrainSession, adapter_info, divide, split
from fttrain.util.errors import UserError

CHECKPOINTS = "checkpoints"  # folder in the run's output
# Values of settings that did not exist when older snapshots were saved
_DEFAULTS_OF_OLD_SNAPSHOTS = {"lora.use_dora": False, "head in 4 bits": False}


def lock_on_main(output: str, resume: str) -> AbstractContextManager[object]:
    """The lock of the run's folder (``lock_output``) on rank 0, which writes; none on the others.
    Needs no process group. Raises UserError as ``lock_output`` does.
    """
    return lock_output(output, resume) if rank_from_environment()[0] == 0 else nullcontext()


def lock_for_training(config: RunConfig) -> AbstractContextManager[object]:
    """The lock of the run's folder as training takes it. A restarted run may always go on in its
    folder, whatever ``resume`` says.
    """
    return lock_on_main(config.output, AUTO if restarted() else config.resume)


def snapshot_of_session(session: TrainSession) -> tuple[str, Snapshot] | None:
    """The snapshot to resume from (``snapshot_to_resume``), with its path; None to start afresh.
    Every rank calls it.

    Raises UserError where it is damaged or was saved with other settings or data.
    """
    # Rank 0's setting, and a restart of any rank, count for all.
    resume = session.group.broadcast_str(session.config.resume)
    again = session.group.any(restarted())
    chosen = snapshot_to_resume(session.output / CHECKPOINTS, resume, session.group, again)
    if chosen is None:
        return None
    path, snapshot = chosen
    for key, now in _identity(session).items():
        before = snapshot.scalars.get(key, _DEFAULTS_OF_OLD_SNAPSHOTS.get(key))
        if before != now:
            raise UserError(
                f"resume={path}: {key} was {before} when it was saved and is {now} now, so the run "
                f"would not go on where it stopped; {_remedy(session, key, before)}, or give "
                "another output= to start afresh"
            )
    return path, snapshot


def _remedy(session: TrainSession, key: str, before: Any) -> str:
    """Advice on how ``key`` gets the value that it had ``before``."""
    rows = session.config.loop.micro_batch_size * session.group.world_size
    if key == "rows per step" and before and before % rows == 0:
        steps, ranks = before // rows, session.group.world_size
        return f"on {ranks} rank(s) loop.gradient_accumulation_steps={steps} keeps it"
    return "restore the setting or the data"


def resume(session: TrainSession, path: str, snapshot: Snapshot) -> None:
    """Load ``snapshot`` into the session. Every rank calls it.

    ``path``: its path, for people to read. Raises UserError where its tensors do not fit the model.
    """
    session.strategy.load_adapter_state(snapshot.adapter)
    session.strategy.load_optimizer_state(snapshot.optimizer)
    if branches_off(session.group.broadcast_str(session.config.resume)):
        _leave_lineage(session, snapshot.step)
    session.guard.restore(snapshot.scalars["guard"])
    session.step = session.loader.position = snapshot.step
    session.say(f"resuming after step {session.step} from {path}")
    _restore_split(session, snapshot.scalars)


def _leave_lineage(session: TrainSession, step: int) -> None:
    """Set the snapshots of later steps than ``step`` aside. Every rank calls it."""
    problem = ""
    if session.group.intra_node.is_main:
        try:
            branch_off(session.output / CHECKPOINTS, step)
        except UserError as error:
            problem = str(error)
    session.group.raise_everywhere(problem)


def last_micro_batch_size(config: RunConfig) -> int:
    """Rows of a micro-batch at the end of the run in ``config.output``, by its newest whole
    snapshot; those of the settings where there is none.
    """
    try:
        path = find_snapshot(Path(config.output) / CHECKPOINTS, AUTO)
    except UserError:  # the adapter may be whole all the same
        path = None
    if path is None:
        return config.loop.micro_batch_size
    return _saved_micro_batch_size(scalars_of(path), config.loop)


def _saved_micro_batch_size(scalars: Mapping[str, Any], loop: LoopConfig) -> int:
    """Rows of a micro-batch when the run was saved, which a shortage of memory may have made
    smaller; those of ``loop`` where the setting has changed since.
    """
    saved = scalars.get("micro_batch_size")
    if saved is None or saved["configured"] != loop.micro_batch_size or not loop.halve_on_oom:
        return loop.micro_batch_size
    size: int = saved["used"]
    return size


def _restore_split(session: TrainSession, scalars: Mapping[str, Any]) -> None:
    loop = session.config.loop
    size = _saved_micro_batch_size(scalars, loop)
    if size < loop.micro_batch_size:
        divide(session, loop.micro_batch_size // size)
        session.say(
            f"with {split(session)}, since memory ran out before with "
            f"loop.micro_batch_size={loop.micro_batch_size}; loop.halve_on_oom=false would try it "
            "again"
        )


def save(session: TrainSession) -> None:
    """Save a snapshot, on rank 0. Every rank calls it; all raise UserError where the disk fails."""
    problem = ""
    adapter, optimizer = session.strategy.adapter_state(), session.strategy.optimizer_state()
    if session.group.is_main:
        snapshot = Snapshot(
            session.step,
            adapter,
            optimizer,
            {
                **_identity(session),
                "guard": session.guard.state(),
                "micro_batch_size": {
                    "configured": session.config.loop.micro_batch_size,
                    "used": session.loader.micro_batch_size,
                },
            },
            adapter_info(session.config),
            session.inputs.source.name,
            session.config.model.revision,
        )
        try:
            with uninterruptible:
                save_snapshot(
                    session.output / CHECKPOINTS, snapshot, session.config.checkpoint.keep_last
                )
        except UserError as error:
            problem = str(error)
    session.group.raise_everywhere(problem)


def _identity(session: TrainSession) -> dict[str, Any]:
    """The values that data and randomness depend on: a resume must find them unchanged."""
    config = session.config
    return {
        "data fingerprint": session.inputs.dataset.fingerprint,
        "rows per step": session.loader.rows_per_step,
        "loop.seed": config.loop.seed,
        "model.name": config.model.name,
        "model.dtype": config.model.dtype,
        "quant.kind": config.quant.kind,
        "quant.blocksize": config.quant.blocksize,
        "quant.double_quant": config.quant.double_quant,
        "lora.r": config.lora.r,
        "lora.lora_alpha": config.lora.lora_alpha,
        "lora.use_rslora": config.lora.use_rslora,
        "lora.lora_dropout": config.lora.lora_dropout,
        "lora.target_modules": _as_json(config.lora.target_modules),
        "frozen base": session.base_digest,
        "lora.use_dora": config.lora.use_dora,
        "head in 4 bits": config.placement.lm_head == "quantized",
    }


def _as_json(modules: str | tuple[str, ...]) -> str | list[str]:
    """``modules`` as a snapshot's JSON returns them."""
    return modules if isinstance(modules, str) else list(modules)
