"""The median rule: a trial that is worse than the median of the finished trials at the same point
is stopped (Golovin et al. 2017, Google Vizier, section 3.2.1).
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from fttrain.sweep.objective import Points, points, smoothed_loss


def curve(folder: Path, evaluated: bool) -> Points:
    """The loss curve of a trial, (step, nats per token): its held-out NLL where the run measures it
    during training (``evaluated``), else its smoothed training loss.
    """
    return points(folder, "holdout_nll") if evaluated else smoothed_loss(folder)


def share_done(points: Points, total_steps: int) -> list[tuple[float, float]]:
    """``points`` over the share of the trial's steps instead of steps: trials differ in length."""
    return [(step / total_steps, value) for step, value in points]


def hopeless(
    trial: Sequence[tuple[float, float]],
    finished: Sequence[Sequence[tuple[float, float]]],
    least: int,
    warmup: float,
) -> bool:
    """Whether the trial's best value lies above the median of the other trials' values at the same
    share of their steps.

    Args:
        trial: (share of the steps, value) of the trial so far.
        finished: the same of each trial that ran to its end.
        least: finished trials needed to judge one.
        warmup: share of the steps before a trial is judged.
    """
    if not trial or trial[-1][0] < warmup:
        return False
    now = trial[-1][0] + 1e-9  # shares are rounded quotients
    others = [[value for at, value in points if at <= now] for points in finished]
    known = [values[-1] for values in others if values]
    best = min(value for _, value in trial)
    return len(known) >= least and best > statistics.median(known)
