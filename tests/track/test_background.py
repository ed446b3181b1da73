"""Whatever a tracker does in its thread, training goes on, and its end is told once."""

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from fttrain.track.background import QUEUE_LENGTH, Background
from fttrain.track.base import Results, Tracker

PLACES = ("start", "log", "show", "finish")


class Faulty(Tracker):
    """Does ``fault`` at ``place``; notes what it was told."""

    def __init__(self, fault: Callable[[], None], place: str) -> None:
        self._fault, self._place = fault, place
        self.told: list[tuple[str, Any]] = []
        self._at("start", None)

    def _at(self, place: str, what: Any) -> None:
        if place == self._place:
            self._fault()
        self.told.append((place, what))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._at("log", (step, dict(values)))

    def show(self, step: int, results: Results) -> None:
        self._at("show", step)

    def finish(self, exit_code: int = 0) -> None:
        self._at("finish", exit_code)


def use(tracker: Background, steps: int = 3) -> None:
    for step in range(1, steps + 1):
        tracker.log(step, {"loss": 1 / step})
    tracker.show(steps, Results())
    tracker.finish(3)
    tracker.finish(4)
    tracker.log(steps + 1, {"loss": 0.0})  # of a run that goes on all the same


def test_everything_arrives_in_order() -> None:
    made: list[Faulty] = []
    said: list[str] = []

    def start() -> Tracker:
        made.append(Faulty(lambda: None, ""))
        return made[0]

    use(Background("it", start, said.append, release=lambda: said.append("released")))
    steps = [("log", (step, {"loss": 1 / step})) for step in (1, 2, 3)]
    assert made[0].told == [("start", None), *steps, ("show", 3), ("finish", 3)]
    assert said == []


@pytest.mark.parametrize("place", PLACES)
def test_one_that_hangs_is_left_behind(place: str) -> None:
    said: list[str] = []
    never = threading.Event()
    tracker = Background(
        "it",
        lambda: Faulty(lambda: never.wait() and None, place),
        said.append,
        finish_s=0.2,
        release=lambda: said.append("released"),
    )
    use(tracker)
    never.set()
    assert said == ["it did not finish within 0 s and was left behind", "released"]


def broken() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (broken, "OSError: [Errno 28] No space left on device"),
        (lambda: sys.exit(3), "SystemExit: 3"),
    ],
)
def test_one_that_raises_is_off(fault: Callable[[], None], what: str, place: str) -> None:
    said: list[str] = []
    release = threading.Event()
    use(Background("it", lambda: Faulty(fault, place), said.append, release=release.set))
    assert said == [f"it failed and is off from here ({what})"]
    assert release.is_set()


def test_one_that_is_too_slow_loses_steps_but_nothing_else() -> None:
    said: list[str] = []
    made: list[Faulty] = []
    go = threading.Event()

    def start() -> Tracker:
        made.append(Faulty(lambda: go.wait() and None, "log"))
        return made[0]

    tracker = Background("it", start, said.append)
    for step in range(1, QUEUE_LENGTH + 500):
        tracker.log(step, {})
    tracker.show(1, Results())
    go.set()
    tracker.finish()
    logged = [what[0] for place, what in made[0].told if place == "log"]
    missing = QUEUE_LENGTH + 499 - len(logged)
    assert 490 <= missing <= 499, "the queue, and perhaps one step in the tracker's hands"
    assert said == [f"it was too slow: {missing} steps are missing there"]
    assert made[0].told[-2:] == [("show", 1), ("finish", 0)]
