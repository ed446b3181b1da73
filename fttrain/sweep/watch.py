"""The progress of a sweep on the terminal, and the updates of its page. Both read the trials'
folders, so trials may run anywhere.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from fttrain.sweep.config import Sweep
from fttrain.sweep.record import FINISHED, Record, records
from fttrain.sweep.results import summary, write_results
from fttrain.track import read_metrics
from fttrain.util.units import duration

LOOK_S = 1.0  # between reads of the folders
LINE_S = 10.0  # between lines of a running trial


class Watch:
    """Watcher of a sweep of ``trial_count`` trials, in a thread of its own."""

    def __init__(self, sweep: Sweep, trial_count: int, side_by_side: int = 1) -> None:
        """``side_by_side``: trials that run at once."""
        self._sweep, self._trial_count, self._side_by_side = sweep, trial_count, side_by_side
        self._console = Console()
        self._ends: dict[str, str] = {}  # name -> the state at its end, as printed
        self._running: dict[str, float] = {}  # name -> time of its last line
        self._done = threading.Event()
        for record in records(sweep.folder):
            self._ends[record.name] = record.state

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Print the trials' progress for the length of the block; at its end the page has all."""
        thread = threading.Thread(target=self._follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            self._look()
            self._say(summary(write_results(self._sweep, self._trial_count)))

    def _follow(self) -> None:
        while not self._done.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        known = records(self._sweep.folder)
        ended = False
        for record in known:
            if record.state == "running":
                self._tell_running(record, known)
            elif self._ends.get(record.name) != record.state:
                self._running.pop(record.name, None)
                self._ends[record.name] = record.state
                self._say(_end(record))
                ended = True
        if ended and not self._done.is_set():
            write_results(self._sweep, self._trial_count)

    def _tell_running(self, record: Record, known: list[Record]) -> None:
        now = time.monotonic()
        if record.name not in self._running:
            self._ends.pop(record.name, None)
            self._running[record.name] = now
            number = sum(other.state != "running" for other in known) + len(self._running)
            self._say(f"trial {min(number, self._trial_count)}/{self._trial_count}: {record.name}")
        elif now - self._running[record.name] >= LINE_S:
            self._running[record.name] = now
            self._say(self._progress(record, known))

    def _progress(self, record: Record, known: list[Record]) -> str:
        """Step, loss, and the time left of the trial and of the sweep, in one line."""
        lines = read_metrics(self._sweep.folder / record.name / "metrics.jsonl")
        steps = [line for line in lines if "step_s" in line]
        taken = time.time() - record.spans[-1][0]
        if not steps:
            return f"{record.name}: {duration(taken)}, no step yet"
        last, total = steps[-1], record.total_steps
        loss = "-" if last["loss"] is None else f"{last['loss']:.4f}"
        text = f"{record.name}: step {last['step']}/{total or '?'}  loss {loss}"
        if not total:
            return text
        recent = [line["step_s"] for line in steps[-20:]]
        left_s = (total - last["step"]) * sum(recent) / len(recent)
        ended = [other for other in known if other.state in FINISHED]
        each_s = [other.seconds for other in ended if other.state == "done"] or [taken + left_s]
        waiting = max(0, self._trial_count - len(ended) - len(self._running))
        sweep_s = left_s + waiting * sum(each_s) / len(each_s) / self._side_by_side
        return f"{text}  {duration(left_s)} left of the trial, {duration(sweep_s)} of the sweep"

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def _end(record: Record) -> str:
    took = duration(record.seconds)
    value = "" if record.value is None else f" with {record.value:.4f}"
    reason = f": {record.reason}" if record.reason else ""
    return f"{record.name}: {record.state}{value} in {took}{reason}"
