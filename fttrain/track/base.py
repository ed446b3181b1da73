"""What a tracker is, and the settings of the tracker beside metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fttrain.errors import UserError

KINDS = ("none", "wandb")
MODES = ("auto", "online", "offline")


@dataclass(frozen=True)
class TrackConfig:
    """An experiment tracker beside metrics.jsonl, which is always written."""

    kind: str = "none"  # none | wandb
    project: str = "fttrain"  # project of the tracker
    name: str | None = None  # name of the run there; None: the name of the output folder
    mode: str = "auto"  # auto | online | offline; auto: online when there is a login, else offline
    memory_every: int = 10  # steps between lines of memory.jsonl; 0: none

    def __post_init__(self) -> None:
        for key, allowed in (("kind", KINDS), ("mode", MODES)):
            value = getattr(self, key)
            if value not in allowed:
                raise UserError(f"track.{key}={value}: must be one of {', '.join(allowed)}")
        if not self.project:
            raise UserError("track.project is empty: give the name of a project")
        if self.memory_every < 0:
            raise UserError(
                f"track.memory_every={self.memory_every}: a number of steps, or 0 for no samples"
            )


class Tracker(Protocol):
    """Takes the numbers of a run as they come. Neither method may slow or stop training."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The metrics of optimizer step ``step`` (1 is the first)."""

    def finish(self) -> None:
        """The last call, also after an error; may be made more than once."""


class Trackers:
    """Several trackers as one; without any, it does nothing (what ranks other than 0 use)."""

    def __init__(
        self,
        trackers: Sequence[Tracker] = (),
        memory: Tracker | None = None,
        charts: Sequence[Tracker] = (),
    ) -> None:
        """``memory``: where samples of memory and cards go as they are; ``charts``: those of
        ``trackers`` that draw them, a figure a name. To the rest they are of no interest.
        """
        self._trackers, self._memory, self._charts = tuple(trackers), memory, tuple(charts)

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

    def finish(self) -> None:
        """Finishes each one, the first given first."""
        for tracker in self._trackers:
            tracker.finish()
        if self._memory is not None:
            self._memory.finish()


def _named(what: str, samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of each of several, such as ``card0/power_w``."""
    return {
        f"{what}{number}/{name}": figure
        for number, sample in enumerate(samples)
        for name, figure in sample.items()
    }


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as JSON knows them: 0-dim tensors and NumPy numbers as numbers, NaN and infinity
    as None.
    """
    result = {}
    for key, value in values.items():
        number = value.item() if hasattr(value, "item") else value
        result[key] = None if isinstance(number, float) and not math.isfinite(number) else number
    return result
