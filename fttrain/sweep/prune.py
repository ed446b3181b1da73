"""The median rule: a trial that is worse than half of the finished ones were at the same point
is stopped (Golovin et al. 2017, Google Vizier, section 3.2.1).
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from fttrain.sweep.objective import Points, loss_points, series, smoothed


def curve(folder: Path, evaluated: bool) -> Points:
    """How good a trial was after which step, in nats per token: its held-out NLL where that is
    taken on the way (``evaluated``), else its smoothed training loss.
    """
    return series(folder, "holdout_nll") if evaluated else smoothed(loss_points(folder))


def share_done(points: Points, total_steps: int) -> list[tuple[float, float]]:
    """``points`` by the share of its steps that a trial had done: trials may differ in length."""
    return [(step / total_steps, value) for step, value in points]


def hopeless(
    own: Sequence[tuple[float, float]],
    finished: Sequence[Sequence[tuple[float, float]]],
    least: int,
    warmup: float,
) -> bool:
    """Whether the best that a trial has reached lies above the median of what the others had at
    that point.

    Args:
        own: (share of the steps, value) of the trial so far.
        finished: the same of each trial that ran to its end.
        least: finished trials before any is judged.
        warmup: share of the steps before a trial is judged.
    """
    if not own or own[-1][0] < warmup:
        return False
    at = own[-1][0]
    others = [_best_until(points, at) for points in finished]
    known = [value for value in others if value is not None]
    if len(known) < least:
        return False
    best = _best_until(own, at)
    return best is not None and best > statistics.median(known)


def _best_until(points: Sequence[tuple[float, float]], share: float) -> float | None:
    return min((value for at, value in points if at <= share + 1e-9), default=None)
