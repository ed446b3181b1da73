"""The progress of a run: a bar on a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fttrain.track.base import Tracker, plain
from fttrain.util.units import duration


def progress(
    total: int, done: int = 0, console: Console | None = None, every_s: float = 10.0
) -> Tracker:
    """Return a bar when the output is a terminal, else a tracker that prints lines.

    Args:
        total: optimizer steps of the whole run.
        done: steps that a resumed run starts from.
        console: the output; standard output by default.
        every_s: least seconds between plain lines; the first and the last step always get one.
    """
    console = console or Console()
    return (
        Bar(total, done, console) if console.is_terminal else Lines(total, done, console, every_s)
    )


def _figures(values: Mapping[str, Any]) -> dict[str, str]:
    """Loss and tokens per second as text, where ``values`` has them."""
    numbers = {key: "-" if value is None else value for key, value in plain(values).items()}
    forms = {"loss": "{:.4f}", "tokens_per_s": "{:,.0f}"}
    return {
        key: numbers[key] if numbers[key] == "-" else form.format(numbers[key])
        for key, form in forms.items()
        if key in numbers
    }


class Bar(Tracker):
    """A rich progress bar with loss, tokens/s and time left; other output appears above it."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[tokens_per_s]} tokens/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        # Steps are long: the rate behind the time left needs more than rich's 30 seconds.
        self._progress.speed_estimate_period = 600.0
        self._total = total
        self._task = self._progress.add_task(
            "", total=total, completed=done, loss="-", tokens_per_s="-"
        )
        self._progress.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Move the bar. The last step ends it."""
        fields: dict[str, Any] = dict(_figures(values))
        self._progress.update(self._task, completed=step, **fields)
        if step == self._total:
            self._progress.stop()

    def finish(self, exit_code: int = 0) -> None:
        """Leave the bar as it stands and release the terminal."""
        self._progress.stop()


class Lines(Tracker):
    """Plain lines of progress, for logs and pipes."""

    def __init__(self, total: int, done: int, console: Console, every_s: float) -> None:
        self._total, self._console, self._every_s = total, console, every_s
        self._start = self._done = done
        self._began = time.monotonic()
        self._last_print = -float("inf")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Print a line, if ``every_s`` seconds have passed since the last one."""
        now, figures = time.monotonic(), _figures(values)
        if "loss" not in figures or (step < self._total and now - self._last_print < self._every_s):
            return
        self._last_print = now
        left_s = (now - self._began) / max(1, step - self._start) * max(0, self._total - step)
        text = (
            f"step {step}/{self._total}  loss {figures['loss']}  "
            f"{figures.get('tokens_per_s', '-')} tokens/s  {duration(left_s)} left"
        )
        self._console.print(text, soft_wrap=True, highlight=False)

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing: there is nothing to release."""


def counting(
    task: str, console: Console | None = None, every_s: float = 10.0
) -> Callable[[int, int], None]:
    """Return a function of (done, total) that shows the progress of ``task`` with the time left.

    On a terminal the line is rewritten in place; elsewhere one is printed every ``every_s``
    seconds.
    """
    console = console or Console()
    began = time.monotonic()
    last_print = began

    def show(done: int, total: int) -> None:
        nonlocal last_print
        now = time.monotonic()
        text = f"{task}: {done}/{total}, {duration((now - began) / done * (total - done))} left"
        if console.is_terminal:
            end = "\n" if done == total else ""
            console.print(f"\r{text}  ", end=end, highlight=False, soft_wrap=True)
        elif now - last_print >= every_s:
            console.print(text, highlight=False, soft_wrap=True)
            last_print = now

    return show
