"""What a tracker is, and the settings of the trackers beside metrics.jsonl."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fttrain.util.errors import UserError

KINDS = ("none", "wandb", "tensorboard")
MODES = ("auto", "online", "offline")


@dataclass(frozen=True)
class TrackConfig:
    """Experiment trackers beside metrics.jsonl, which is always written."""

    kind: str | tuple[str, ...] = "none"  # none | wandb | tensorboard, or several of them
    project: str = "fttrain"  # project in W&B
    entity: str | None = None  # user or team there; None: the login's own
    name: str | None = None  # name of the run there; None: the name of the output folder
    group: str | None = None  # runs that belong together there
    tags: tuple[str, ...] = ()
    notes: str | None = None
    mode: str = (
        "auto"  # of W&B: auto (online when there is a login, else offline) | online | offline
    )
    memory_every: int = 10  # steps between lines of memory.jsonl; 0: none

    def __post_init__(self) -> None:
        for kind in self.kinds or ("none",):
            if kind not in KINDS:
                raise UserError(
                    f"track.kind={kind}: must be one of {', '.join(KINDS)}, or several such as "
                    "[wandb,tensorboard]"
                )
        if self.mode not in MODES:
            raise UserError(f"track.mode={self.mode}: must be one of {', '.join(MODES)}")
        if "tensorboard" in self.kinds and importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "track.kind=tensorboard: its package is not installed; "
                "`pip install 'fttrain[tensorboard]'` adds it"
            )
        for key in ("project", "entity", "name", "group"):
            if getattr(self, key) == "":
                raise UserError(f"track.{key} is empty: give it a name")
        if "" in self.tags:
            raise UserError("track.tags: one of them is empty")
        if self.memory_every < 0:
            raise UserError(
                f"track.memory_every={self.memory_every}: a number of steps, or 0 for no samples"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that are wanted, each once."""
        named = (self.kind,) if isinstance(self.kind, str) else self.kind
        return tuple(dict.fromkeys(kind for kind in named if kind != "none"))


class Table(NamedTuple):
    """Rows under names, each as long as ``columns``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


@dataclass(frozen=True)
class Results:
    """What a tracker with pages for it shows, as far as a run has come."""

    holdout_nll: float | None = None  # after this very step, where it was taken
    tables: Mapping[str, Table] = field(default_factory=dict)
    summary: Mapping[str, float] = field(default_factory=dict)  # a figure a run, to compare runs by
    plots: Mapping[str, Path] = field(default_factory=dict)  # name -> PNG


class Tracker:
    """Takes the numbers of a run as they come. No call may slow or stop training."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The metrics of optimizer step ``step`` (1 is the first)."""

    def show(self, step: int, results: Results) -> None:
        """What there is to see after ``step`` beside the metrics, in place of what was before."""

    def finish(self, exit_code: int = 0) -> None:
        """The last call, also after an error; may be made more than once.

        ``exit_code``: how the run ended, as its process will tell.
        """


class Trackers:
    """Several trackers as one; without any, it does nothing (what ranks other than 0 use)."""

    def __init__(
        self,
        trackers: Sequence[Tracker] = (),
        memory: Tracker | None = None,
        charts: Sequence[Tracker] = (),
    ) -> None:
        """``memory``: where samples of memory and cards go as they are; ``charts``: those of
        ``trackers`` that draw them, a figure a name, and that have results to show. To the rest
        they are of no interest.
        """
        self._trackers, self._memory, self._charts = tuple(trackers), memory, tuple(charts)
        self.exit_code = 0  # how the run ended, as far as is known

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Passes the metrics on."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def log_memory(
        self,
        step: int,
        ranks: Sequence[Mapping[str, int]],
        cards: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Each rank's memory after ``step``, by rank: name -> bytes; and of GPUs each rank's card:
        name -> figure.
        """
        if self._memory is not None:
            self._memory.log(step, {"ranks": ranks} | ({"cards": cards} if cards else {}))
        named = _named("rank", ranks) | _named("card", cards)
        for tracker in self._charts:
            tracker.log(step, named)

    def show(self, step: int, read: Callable[[], Results]) -> None:
        """Passes on what ``read`` gives, the results after ``step``, where there is a tracker for
        it; the held-out loss becomes a point of its chart.
        """
        results = read() if self._charts else Results()
        for tracker in self._charts:
            if results.holdout_nll is not None:
                tracker.log(step, {"holdout_nll": results.holdout_nll})
            tracker.show(step, results)

    def finish(self) -> None:
        """Finishes each one, the first given first."""
        for tracker in self._trackers:
            tracker.finish(self.exit_code)
        if self._memory is not None:
            self._memory.finish(self.exit_code)


def _named(what: str, samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of each of several, such as ``card0/power_w``."""
    return {
        f"{what}{number}/{name}": figure
        for number, sample in enumerate(samples)
        for name, figure in sample.items()
    }


def _cell(value: Any) -> str:
    """One line of text that cannot end its cell."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as JSON knows them: 0-dim tensors and NumPy numbers as numbers, NaN and infinity
    as None.
    """
    result = {}
    for key, value in values.items():
        number = value.item() if hasattr(value, "item") else value
        result[key] = None if isinstance(number, float) and not math.isfinite(number) else number
    return result
