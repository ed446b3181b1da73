"""Checks of a sweep before its first trial. Each raises UserError, in one line."""

from collections.abc import Sequence
from pathlib import Path

from fttrain.checkpoint.output_lock import TRACES
from fttrain.config.run_config import RunConfig, compose
from fttrain.sweep.axes import Axis, combinations
from fttrain.sweep.config import Sweep, SweepConfig
from fttrain.sweep.record import Record, records
from fttrain.sweep.trial import identity, trial_arguments
from fttrain.track import counting
from fttrain.util.errors import UserError

MANY = 30  # trials from which composing takes seconds and shows its progress


def samples(axes: dict[str, Axis]) -> list[list[str]]:
    """The trials to check for all others: every combination where all values can be listed; else
    each axis' values, or ends, with the first value of the other axes.
    """
    if all(axis.discrete for axis in axes.values()):
        return combinations(axes)
    values = [axis.values() for axis in axes.values()]
    first = [texts[0] for texts in values]
    return [
        [*first[:at], text, *first[at + 1 :]] for at, texts in enumerate(values) for text in texts
    ]


def check_axes(axes: dict[str, Axis], takes_intervals: bool) -> None:
    """Raise UserError where no setting differs, or the sweeper cannot choose values."""
    if not axes:
        raise UserError(
            "-m: nothing differs between trials: give a setting several values, such as "
            "optim.lr=1e-4,2e-4, or a search such as sweep=lora_lr"
        )
    for axis in axes.values():
        if not axis.discrete and not takes_intervals:
            raise UserError(
                f"{axis.key}={axis.text}: an interval is for a sweeper that chooses values "
                "(hydra/sweeper=optuna); all combinations are tried of values such as 1e-4,2e-4"
            )


def check_trials(
    fixed: Sequence[str], trials: Sequence[Sequence[str]], settings: SweepConfig
) -> list[RunConfig]:
    """The configuration of each trial.

    Raises UserError, naming the trial, for the first that is invalid or cannot be measured.
    """
    show = counting("checking trials") if len(trials) >= MANY else lambda done, total: None
    configs = []
    for number, overrides in enumerate(trials, 1):
        try:
            config = compose([*fixed, *overrides])
        except UserError as error:
            raise UserError(f"trial {' '.join(overrides)}: {error}") from None
        check_objective(config, settings)
        configs.append(config)
        show(number, len(trials))
    return configs


def check_objective(config: RunConfig, settings: SweepConfig) -> None:
    """Raise UserError where a run would lack the objective, or the losses that pruning compares."""
    if settings.objective == "holdout_nll" and not config.data.holdout:
        raise UserError(
            "sweep.objective=holdout_nll: data.holdout=0 leaves nothing to measure it on: hold a "
            "part out (data.holdout=0.1), or take sweep.objective=train_loss"
        )
    if settings.prune != "none" and settings.objective == "step_s":
        raise UserError("sweep.prune=median: it compares losses; sweep.objective=step_s has none")


def check_folder(folder: Path) -> None:
    """Raise UserError where ``folder`` holds a run instead of a sweep."""
    traces = [name for name in TRACES if (folder / name).exists()]
    if traces:
        raise UserError(
            f"output={folder}: already holds a run ({traces[0]}): a sweep needs a folder of its own"
        )


def check_earlier(sweep: Sweep, alone: Sequence[str]) -> None:
    """Raise UserError where the folder holds a trial with other settings than this sweep's: its
    result could not be compared.

    ``alone``: the further overrides of trials that run side by side; else empty.
    """
    for record in records(sweep.folder):
        if record.settings:
            _check_same(sweep, record, alone)


def _check_same(sweep: Sweep, record: Record, alone: Sequence[str]) -> None:
    problem = ""
    try:
        now = identity(compose([*trial_arguments(sweep, record.overrides), *alone]))
        changed = _difference(record.settings, now)
        if changed is not None:
            key, before, after = changed
            problem = f"{key} was {before} there and is {after} now"
    except UserError as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"output={sweep.folder}: trial {record.name} was made with other settings: {problem}; "
            "restore it, or give another output="
        )


def _difference(before: object, now: object, name: str = "") -> tuple[str, object, object] | None:
    """The first key that differs, with both values; None without one. ``before`` is from JSON."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            if key in before and key in now:
                inner = _difference(before[key], now[key], f"{name}.{key}" if name else key)
                if inner is not None:
                    return inner
        # A key of only one side belongs to another version: no setting was changed.
        return None
    return None if before == now else (name, before, now)
