"""What a sweep minimises, and where a trial has it."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fttrain.track.metrics import read_metrics
from fttrain.track.results import holdout_nll, read_evaluation, series, smoothed

Points = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class SweepObjective:
    """One that a sweep can be told."""

    label: str  # with its unit
    measure: Callable[[Path], float | None]  # of a trial's folder; None: it has none


def _holdout_nll(folder: Path) -> float | None:
    return holdout_nll(read_evaluation(folder / "evaluation.json"), "tuned")


def _train_loss(folder: Path) -> float | None:
    found = smoothed_loss(folder)
    return found[-1][1] if found else None


def _step_s(folder: Path) -> float | None:
    taken = [seconds for _, seconds in points(folder, "step_s")]
    return statistics.median(taken) if taken else None


OBJECTIVES = {
    "holdout_nll": SweepObjective("held-out NLL, nats/token", _holdout_nll),
    "train_loss": SweepObjective("training loss, nats/token", _train_loss),
    "step_s": SweepObjective("seconds of a step", _step_s),
}


def points(folder: Path, key: str) -> Points:
    """(step, value) of the run's metrics where ``key`` is a number."""
    return series(read_metrics(folder / "metrics.jsonl"), key)


def smoothed_loss(folder: Path) -> Points:
    """Training loss in nats per token of each step that has one, smoothed."""
    found = points(folder, "loss")
    return list(zip((step for step, _ in found), smoothed(v for _, v in found), strict=True))
