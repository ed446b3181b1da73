"""The median rule: a trial that is worse than half of the finished ones were at the same point
is stopped (Golovin et al. 2017, Google Vizier, section 3.2.1).
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from fttrain.sweep.objective import Points, points, smoothed_loss


def curve(folder: Path, evaluated: bool) -> Points:
    """How good a trial was after which step, in nats per token: its held-out NLL where that is
    taken on the way (``evaluated``), else its smoothed training loss.
    """
    return points(folder, "holdout_nll") if evaluated else smoothed_loss(folder)


def share_done(points: Points, total_steps: int) -> list[tuple[float, float]]:
    """``points`` by the share of its steps that a trial had done: trials may differ in length."""
    return [(step / total_steps, value) for step, value in points]


def hopeless(
    own: Sequence[tuple[float, float]],
    finished: Sequence[Sequence[tuple[float, float]]],
    least: int,
    warmup: float,
) -> bool:
    """Whether the best that a trial has reached lies above the median of what the others had when
    they had done the same share of their steps.

    Args:
        own: (share of the steps, value) of the trial so far.
        finished: the same of each trial that ran to its end.
        least: finished trials before any is judged.
        warmup: share of the steps before a trial is judged.
    """
    if not own or own[-1][0] < warmup:
        return False
    now = own[-1][0] + 1e-9  # shares are quotients
    others = [[value for at, value in points if at <= now] for points in finished]
    known = [values[-1] for values in others if values]
    best = min(value for _, value in own)
    return len(known) >= least and best > statistics.median(known)
