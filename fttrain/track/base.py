"""The tracker's interface, and the settings of the trackers beside metrics.jsonl."""

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
    mode: str = "auto"  # of W&B: auto (online with a login, else offline) | online | offline
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
        """The configured kinds, each once, without none."""
        named = (self.kind,) if isinstance(self.kind, str) else self.kind
        return tuple(dict.fromkeys(kind for kind in named if kind != "none"))


class Table(NamedTuple):
    """Rows under the names of their columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


@dataclass(frozen=True)
class Results:
    """The results of a run so far, for trackers with pages: tables, plots and figures."""

    holdout_nll: float | None = None  # nats per token, where it was measured after this step
    tables: Mapping[str, Table] = field(default_factory=dict)
    summary: Mapping[str, float] = field(default_factory=dict)  # figures to compare runs by
    plots: Mapping[str, Path] = field(default_factory=dict)  # name -> PNG


class Tracker:
    """Receiver of the numbers of a run. No call may slow or stop training."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the metrics of optimizer step ``step`` (from 1)."""

    def show(self, step: int, results: Results) -> None:
        """Show the results after ``step`` in place of earlier ones."""

    def finish(self, exit_code: int = 0) -> None:
        """Finish: the last call, also after an error. A repeated call does nothing more.

        ``exit_code``: the exit code of the run's process.
        """


class Trackers:
    """Several trackers as one. Without any it does nothing, as ranks other than 0 need it."""

    def __init__(
        self,
        trackers: Sequence[Tracker] = (),
        memory: Tracker | None = None,
        charts: Sequence[Tracker] = (),
    ) -> None:
        """``memory``: receives samples of memory and cards as they are; ``charts``: the members of
        ``trackers`` that draw each figure of these samples and show results.
        """
        self._trackers, self._memory, self._charts = tuple(trackers), memory, tuple(charts)
        self.exit_code = 0  # of the run, as far as is known

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass the metrics of ``step`` to each tracker."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def log_memory(
        self,
        step: int,
        ranks: Sequence[Mapping[str, int]],
        cards: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Record samples after ``step``. ``ranks``: each rank's memory, name -> bytes; ``cards``:
        each rank's GPU, name -> figure, empty on CPUs.
        """
        if self._memory is not None:
            self._memory.log(step, {"ranks": ranks} | ({"cards": cards} if cards else {}))
        named = _named("rank", ranks) | _named("card", cards)
        for tracker in self._charts:
            tracker.log(step, named)

    def show(self, step: int, read: Callable[[], Results]) -> None:
        """Pass the results after ``step`` to the charts. ``read`` returns them and is called only
        where there are charts. The held-out loss becomes a point of its chart.
        """
        results = read() if self._charts else Results()
        for tracker in self._charts:
            if results.holdout_nll is not None:
                tracker.log(step, {"holdout_nll": results.holdout_nll})
            tracker.show(step, results)

    def finish(self) -> None:
        """Finish each tracker, in order."""
        for tracker in self._trackers:
            tracker.finish(self.exit_code)
        if self._memory is not None:
            self._memory.finish(self.exit_code)


def _named(prefix: str, samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of all samples under names such as ``card0/power_w``."""
    return {
        f"{prefix}{number}/{name}": figure
        for number, sample in enumerate(samples)
        for name, figure in sample.items()
    }


def _cell(value: Any) -> str:
    """``value`` as one line of text that cannot end its cell."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as JSON types: 0-dim tensors and NumPy numbers as numbers, NaN and infinity as
    None.
    """
    result = {}
    for key, value in values.items():
        number = value.item() if hasattr(value, "item") else value
        result[key] = None if isinstance(number, float) and not math.isfinite(number) else number
    return result
