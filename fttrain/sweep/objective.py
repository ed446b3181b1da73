"""What a sweep minimises, and where a trial has it."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fttrain.track.metrics import read_metrics

SMOOTHING = 0.1  # weight of the newest loss in a smoothed one

Points = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Objective:
    """One that a sweep can be told."""

    label: str  # with its unit
    measure: Callable[[Path], float | None]  # of a trial's folder; None: it has none


def _holdout_nll(folder: Path) -> float | None:
    try:
        value = json.loads((folder / "evaluation.json").read_bytes())["tuned"]["nll"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return finite(value)


def _train_loss(folder: Path) -> float | None:
    points = smoothed(loss_points(folder))
    return points[-1][1] if points else None


def _step_s(folder: Path) -> float | None:
    taken = [line["step_s"] for line in read_metrics(folder / "metrics.jsonl") if "step_s" in line]
    return finite(statistics.median(taken)) if taken else None


OBJECTIVES = {
    "holdout_nll": Objective("held-out NLL, nats/token", _holdout_nll),
    "train_loss": Objective("training loss, nats/token", _train_loss),
    "step_s": Objective("seconds of a step", _step_s),
}


def loss_points(folder: Path) -> Points:
    """Training loss in nats per token of each step that has one."""
    return series(folder, "loss")


def series(folder: Path, key: str) -> Points:
    """(step, value) of metrics.jsonl where ``key`` is a finite number."""
    found = [
        (line["step"], finite(line.get(key))) for line in read_metrics(folder / "metrics.jsonl")
    ]
    return [(step, value) for step, value in found if value is not None]


def smoothed(points: Points) -> Points:
    """Exponential mean, a plain one at first, so that it starts without a lag."""
    mean, result = 0.0, []
    for count, (step, value) in enumerate(points, 1):
        mean += max(1 / count, SMOOTHING) * (value - mean)
        result.append((step, mean))
    return result


def finite(value: object) -> float | None:
    """``value`` where it is a number and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
