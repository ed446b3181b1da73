"""The settings of a sweep, and the data that all of its trials share."""

import math
from dataclasses import dataclass
from pathlib import Path

from fttrain.sweep.objective import OBJECTIVES
from fttrain.util.errors import UserError

PARALLEL = ("none", "cards")
PRUNE = ("none", "median")


@dataclass(frozen=True)
class SweepConfig:
    """The objective of a sweep, and the way its trials run."""

    objective: str = "holdout_nll"  # it is minimised: holdout_nll | train_loss | step_s
    # none: one trial after the other | cards: side by side, each on a card (or share of the cores)
    parallel: str = "none"
    prune: str = "none"  # none | median
    prune_after: int = 3  # finished trials before any is pruned
    prune_warmup: float = 0.3  # share of a trial's steps before it may be pruned

    def __post_init__(self) -> None:
        allowed = {"objective": OBJECTIVES, "parallel": PARALLEL, "prune": PRUNE}
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise UserError(f"sweep.{key}={getattr(self, key)}: {', '.join(values)}")
        if self.prune_after < 1:
            raise UserError(f"sweep.prune_after={self.prune_after}: finished trials, 1 or more")
        if not (math.isfinite(self.prune_warmup) and 0 <= self.prune_warmup < 1):
            raise UserError(f"sweep.prune_warmup={self.prune_warmup}: a share in [0, 1)")


@dataclass(frozen=True)
class Sweep:
    """A sweep, as every trial receives it in whichever process it runs."""

    folder: Path  # absolute
    fixed: tuple[str, ...]  # overrides of all trials, as `fttrain train` takes them
    config: SweepConfig
    cwd: Path  # the folder that the sweep was started in; relative paths start there
    host: str  # of the process that runs the search
