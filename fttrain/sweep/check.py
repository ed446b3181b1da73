"""What is wrong with a sweep is said before its first trial, in one line."""

from collections.abc import Sequence
from pathlib import Path

from fttrain.checkpoint.output_lock import TRACES
from fttrain.config.run_config import RunConfig, compose
from fttrain.sweep.axes import Axis, combinations
from fttrain.sweep.config import Sweep, SweepConfig
from fttrain.sweep.record import Record, records
from fttrain.sweep.trial import identity, told
from fttrain.track import counting
from fttrain.util.errors import UserError

MANY = 30  # configurations to compose: from here on it takes seconds, and is shown


def samples(axes: dict[str, Axis]) -> list[list[str]]:
    """Trials whose configurations stand for all: every combination where the values can be listed;
    else each axis' values, or ends, with the first of the others.
    """
    if all(axis.discrete for axis in axes.values()):
        return combinations(axes)
    values = [axis.values() for axis in axes.values()]
    first = [own[0] for own in values]
    return [
        [*first[:at], value, *first[at + 1 :]] for at, own in enumerate(values) for value in own
    ]


def check_axes(axes: dict[str, Axis], takes_intervals: bool) -> None:
    """Raises UserError where nothing differs, or the sweeper cannot choose values."""
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
    """The configuration of each; raises UserError, naming the trial, for the first that is wrong or
    cannot be measured.
    """
    show = counting("checking trials") if len(trials) >= MANY else lambda done, total: None
    found = []
    for number, overrides in enumerate(trials, 1):
        try:
            config = compose([*fixed, *overrides])
        except UserError as error:
            raise UserError(f"trial {' '.join(overrides)}: {error}") from None
        check_objective(config, settings)
        found.append(config)
        show(number, len(trials))
    return found


def check_objective(config: RunConfig, settings: SweepConfig) -> None:
    """Raises UserError where a run would not have what is minimised, or what pruning looks at."""
    if settings.objective == "holdout_nll" and not config.data.holdout:
        raise UserError(
            "sweep.objective=holdout_nll: data.holdout=0 leaves nothing to measure it on: hold a "
            "part out (data.holdout=0.1), or take sweep.objective=train_loss"
        )
    if settings.prune != "none" and settings.objective == "step_s":
        raise UserError("sweep.prune=median: it compares losses; sweep.objective=step_s has none")


def check_folder(folder: Path) -> None:
    """Raises UserError where a run is, and not a sweep."""
    traces = [name for name in TRACES if (folder / name).exists()]
    if traces:
        raise UserError(
            f"output={folder}: already holds a run ({traces[0]}): a sweep needs a folder of its own"
        )


def check_earlier(sweep: Sweep, alone: Sequence[str]) -> None:
    """Raises UserError where the folder holds a trial that was made with other settings than this
    sweep's: they could not be compared.

    ``alone``: what a trial is told beside them where it has a place of its own.
    """
    for record in records(sweep.folder):
        if record.settings:
            _check_same(sweep, record, alone)


def _check_same(sweep: Sweep, record: Record, alone: Sequence[str]) -> None:
    problem = ""
    try:
        now = identity(compose([*told(sweep, record.overrides), *alone]))
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
    """The first key that differs, with both values; a trial's record went through JSON."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            if key in before and key in now:
                inner = _difference(before[key], now[key], f"{name}.{key}" if name else key)
                if inner is not None:
                    return inner
        # A key that only one of them has came or went with a version: no setting was changed.
        return None
    return None if before == now else (name, before, now)
