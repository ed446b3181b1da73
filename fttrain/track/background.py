"""A tracker in a thread of its own: slow, hanging, broken or missing, it costs a warning.

Everything that a tracker does, its imports included, may wait for a server or a disk that never
answers. So all of it happens in one background thread, which is fed by a queue.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fttrain.track.base import Results, Tracker, plain
from fttrain.track.metrics import Warn, to_stderr
from fttrain.util.errors import first_line

QUEUE_LENGTH = 1000  # steps that may wait for a slow tracker before new ones are dropped
FINISH_S = 60.0  # how long the end of a run may wait for a tracker

_Call = Callable[[Tracker], None]


def no_release() -> None:
    """Of a tracker that leaves nothing behind."""


class Background(Tracker):
    """A tracker behind a thread. ``log`` and ``show`` never wait; ``finish`` waits a limited time.

    The first thing that the tracker raises (SystemExit, too) turns it off, with one warning.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Tracker],
        warn: Warn = to_stderr,
        finish_s: float = FINISH_S,
        release: Callable[[], None] = no_release,
    ) -> None:
        """Starts the thread.

        Args:
            name: what warnings call it.
            start: makes the tracker; called in the thread.
            warn: takes the one warning of a failure.
            finish_s: seconds that the end of the run may wait.
            release: called by ``finish`` after a failure, or when these seconds were not enough:
                lets go of what would keep the process from ending.
        """
        self._name, self._start, self._warn = name, start, warn
        self._finish_s, self._release = finish_s, release
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._dropped = 0
        self._failed = self._finished = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hands the metrics to the thread; drops them when it cannot keep up."""
        if self._calls.qsize() >= QUEUE_LENGTH:
            self._dropped += not self._failed
            return
        figures = plain(values)
        self._call(lambda tracker: tracker.log(step, figures))

    def show(self, step: int, results: Results) -> None:
        """Hands the results to the thread. They are few, so there is always room."""
        self._call(lambda tracker: tracker.show(step, results))

    def finish(self, exit_code: int = 0) -> None:
        """Waits ``finish_s`` seconds at most for all that was handed over."""
        if self._finished:
            return
        self._call(lambda tracker: tracker.finish(exit_code))
        self._calls.put(None)
        self._finished = True
        self._thread.join(self._finish_s)
        if self._thread.is_alive() and not self._failed:
            self._failed = True
            self._warn(
                f"{self._name} did not finish within {self._finish_s:.0f} s and was left behind"
            )
        elif self._dropped and not self._failed:  # a failure has had its one warning
            self._warn(f"{self._name} was too slow: {self._dropped} steps are missing there")
        if self._failed:
            self._release()

    def _call(self, call: _Call) -> None:
        if not self._failed and not self._finished:
            self._calls.put(call)

    def _work(self) -> None:
        """The thread: the only place that touches the tracker."""
        tracker = None
        try:
            tracker = self._start()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except BaseException as error:  # SystemExit, too: it must not end training
            if self._failed:
                return
            self._failed = True
            what = f"{type(error).__name__}: {first_line(error)}"
            self._warn(f"{self._name} failed and is off from here ({what})")
            if tracker is not None:  # what it has so far may still be saved
                with contextlib.suppress(BaseException):
                    tracker.finish()
