"""The objectives that a sweep can minimise, and their values in a trial's folder."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fttrain.track.metrics import read_metrics
from fttrain.track.results import holdout_nll, read_evaluation, series, smoothed

Points = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class SweepObjective:
    """An objective of a sweep."""

    label: str  # with its unit
    measure: Callable[[Path], float | None]  # its value in a trial's folder; None: not there


def _holdout_nll(folder: Path) -> float | None:
    return holdout_nll(read_evaluation(folder / "evaluation.json"), "tuned")


def _train_loss(folder: Path) -> float | None:
    losses = smoothed_loss(folder)
    return losses[-1][1] if losses else None


def _step_s(folder: Path) -> float | None:
    durations = [seconds for _, seconds in points(folder, "step_s")]
    return statistics.median(durations) if durations else None


OBJECTIVES = {
    "holdout_nll": SweepObjective("held-out NLL, nats/token", _holdout_nll),
    "train_loss": SweepObjective("training loss, nats/token", _train_loss),
    "step_s": SweepObjective("seconds of a step", _step_s),
}


def points(folder: Path, key: str) -> Points:
    """The (step, value) pairs of the run's metrics where ``key`` is a number."""
    return series(read_metrics(folder / "metrics.jsonl"), key)


def smoothed_loss(folder: Path) -> Points:
    """The smoothed training loss, in nats per token, of each step that has a loss."""
    losses = points(folder, "loss")
    steps, values = (step for step, _ in losses), (value for _, value in losses)
    return list(zip(steps, smoothed(values), strict=True))
