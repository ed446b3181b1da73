"""A tracker in a background thread: if it is slow, hangs, breaks or is missing, it costs a warning.

Every action of a tracker, its imports included, may wait for a server or a disk that never answers.
So the thread alone runs the tracker, fed by a queue.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fttrain.track.base import Results, Tracker, plain
from fttrain.util.errors import first_line
from fttrain.util.warn import Warn, warn

QUEUE_LENGTH = 1000  # steps that may wait for a slow tracker; further ones are dropped
FINISH_S = 60.0  # longest wait for a tracker at the end of a run

_Call = Callable[[Tracker], None]


def no_release() -> None:
    """Release nothing: for a tracker that holds nothing."""


class Background(Tracker):
    """A tracker behind a thread. ``log`` and ``show`` never wait; ``finish`` waits a limited time.

    The first exception of the tracker (SystemExit, too) turns it off, with one warning.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Tracker],
        warn: Warn = warn,
        finish_s: float = FINISH_S,
        release: Callable[[], None] = no_release,
    ) -> None:
        """Start the thread.

        Args:
            name: the tracker's name in warnings.
            start: makes the tracker; called in the thread.
            warn: called with the one warning of a failure.
            finish_s: longest wait of ``finish``, in seconds.
            release: called by ``finish`` after a failure or a timeout, to release everything that
                would keep the process from ending.
        """
        self._name, self._start, self._warn = name, start, warn
        self._finish_s, self._release = finish_s, release
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._dropped = 0
        self._failed = self._finished = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass the metrics to the thread, or drop them when its queue is full."""
        if self._calls.qsize() >= QUEUE_LENGTH:
            self._dropped += not self._failed
            return
        figures = plain(values)
        self._call(lambda tracker: tracker.log(step, figures))

    def show(self, step: int, results: Results) -> None:
        """Pass the results to the thread. They are few, so the queue's length does not matter."""
        self._call(lambda tracker: tracker.show(step, results))

    def finish(self, exit_code: int = 0) -> None:
        """Wait for the calls in the queue, ``finish_s`` seconds at most."""
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
        elif self._dropped and not self._failed:  # a failure was warned of already
            self._warn(f"{self._name} was too slow: {self._dropped} steps are missing there")
        if self._failed:
            self._release()

    def _call(self, call: _Call) -> None:
        if not self._failed and not self._finished:
            self._calls.put(call)

    def _work(self) -> None:
        """The thread's function: it alone touches the tracker."""
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
            if tracker is not None:  # may still save its data
                with contextlib.suppress(BaseException):
                    tracker.finish()
