"""How a run is saved, and goes on from what it has saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fttrain.checkpoint import discovery
from fttrain.checkpoint.lineage import branch_off
from fttrain.checkpoint.snapshot import WORDS, Snapshot, find_snapshot, save_snapshot, scalars_of
from fttrain.config.loop_config import LoopConfig
from fttrain.config.run_config import RunConfig
from fttrain.distributed.peer_watchdog import uninterruptible
from fttrain.launcher.launch import restarted
from fttrain.training.session import TrainSession, adapter_info, divide, split
from fttrain.util.errors import UserError

# Of keys that older snapshots lack
_BEFORE_THERE_WAS_A_CHOICE = {"lora.use_dora": False, "head in 4 bits": False}


def wanted_snapshot(run: TrainSession) -> tuple[str, Snapshot] | None:
    """Path and content of the snapshot that ``resume`` asks for, if there is one; of a run that its
    launcher has started again the newest that it has left.

    Raises UserError where it is damaged or was saved with other settings or data.
    """
    asked, again = run.group.broadcast_str(run.config.resume), run.group.any(restarted())
    found = discovery.snapshot_to_resume(run.output / "checkpoints", asked, run.group, again)
    if found is None:
        return None
    path, snapshot = found
    for key, now in _identity(run).items():
        before = snapshot.scalars.get(key, _BEFORE_THERE_WAS_A_CHOICE.get(key))
        if before != now:
            raise UserError(
                f"resume={path}: {key} was {before} when it was saved and is {now} now, so the run "
                f"would not go on where it stopped; {_remedy(run, key, before)}, or give "
                "another output= to start afresh"
            )
    return path, snapshot


def _remedy(run: TrainSession, key: str, before: Any) -> str:
    """What makes ``key`` what it was ``before``."""
    rows = run.config.loop.micro_batch_size * run.group.world_size
    if key == "rows per step" and before and before % rows == 0:
        return (
            f"on {run.group.world_size} rank(s) loop.gradient_accumulation_steps={before // rows} "
            "keeps it"
        )
    return "restore the setting or the data"


def resume(run: TrainSession, path: str, snapshot: Snapshot) -> None:
    """Go on from ``snapshot``. Raises UserError where its tensors do not fit the model."""
    run.strategy.load_adapter_state(snapshot.adapter)
    run.strategy.load_optimizer_state(snapshot.optimizer)
    if run.group.broadcast_str(run.config.resume) not in WORDS:
        _leave_course(run, snapshot.step)
    run.guard.restore(snapshot.scalars["guard"])
    run.step = run.loader.position = snapshot.step
    run.say(f"resuming after step {run.step} from {path}")
    _keep_split(run, snapshot.scalars)


def _leave_course(run: TrainSession, step: int) -> None:
    """What was saved after ``step`` is not this run's any more. Every rank calls it."""
    problem = ""
    if run.group.intra_node.is_main:
        try:
            branch_off(run.output / "checkpoints", step)
        except UserError as error:
            problem = str(error)
    run.group.raise_everywhere(problem)


def last_micro_batch_size(config: RunConfig) -> int:
    """Rows of the micro-batches that the run in ``config.output`` had come to, by its newest whole
    snapshot; those of the settings where there is none.
    """
    try:
        path = find_snapshot(Path(config.output) / "checkpoints", "auto")
    except UserError:  # what has trained may be elsewhere
        path = None
    return config.loop.micro_batch_size if path is None else _kept(scalars_of(path), config.loop)


def _kept(scalars: Mapping[str, Any], loop: LoopConfig) -> int:
    """Rows of micro-batches as small as a run had made them when it was saved, unless their setting
    is another one now.
    """
    saved = scalars.get("micro_batch_size")
    if saved is None or saved["configured"] != loop.micro_batch_size or not loop.halve_on_oom:
        return loop.micro_batch_size
    used: int = saved["used"]
    return used


def _keep_split(run: TrainSession, scalars: Mapping[str, Any]) -> None:
    loop = run.config.loop
    used = _kept(scalars, loop)
    if used < loop.micro_batch_size:
        divide(run, loop.micro_batch_size // used)
        run.say(
            f"with {split(run)}, since memory ran out before with "
            f"loop.micro_batch_size={loop.micro_batch_size}; loop.halve_on_oom=false would try it "
            "again"
        )


def save(run: TrainSession) -> None:
    """Rank 0 writes; the others wait, and all end together where the disk fails."""
    problem = ""
    adapter, optimizer = run.strategy.adapter_state(), run.strategy.optimizer_state()
    if run.group.is_main:
        snapshot = Snapshot(
            run.step,
            adapter,
            optimizer,
            {
                **_identity(run),
                "guard": run.guard.state(),
                "micro_batch_size": {
                    "configured": run.config.loop.micro_batch_size,
                    "used": run.loader.micro_batch_size,
                },
            },
            adapter_info(run.config),
            run.base_model,
            run.config.model.revision,
        )
        try:
            with uninterruptible:
                save_snapshot(run.output / "checkpoints", snapshot, run.config.checkpoint.keep_last)
        except UserError as error:
            problem = str(error)
    run.group.raise_everywhere(problem)


def _identity(run: TrainSession) -> dict[str, Any]:
    """What must be the same before and after a resume for the data and the randomness to go on."""
    config = run.config
    return {
        "data fingerprint": run.dataset.fingerprint,
        "rows per step": run.loader.rows_per_step,
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
        "frozen base": run.base_digest,
        "lora.use_dora": config.lora.use_dora,
        "head in 4 bits": config.placement.lm_head == "quantized",
    }


def _as_json(modules: str | tuple[str, ...]) -> str | list[str]:
    """As it comes back from a snapshot's JSON."""
    return modules if isinstance(modules, str) else list(modules)
