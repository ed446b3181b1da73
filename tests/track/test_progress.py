"""A bar on a terminal, plain lines elsewhere."""

import io
import re

from rich.console import Console

from fttrain.track import progress

VALUES = {"loss": 2.34567, "tokens_per_s": 1234.5}


def written(terminal: bool, steps: list[int], done: int = 0, every_s: float = 0.0) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    tracker = progress(10, done, console, every_s)
    for step in steps:
        tracker.log(step, VALUES)
    tracker.log(steps[-1], {"holdout_nll": 1.0})  # an evaluation leaves loss and rate standing
    tracker.finish()
    tracker.finish()
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    text = written(False, list(range(1, 11)))
    lines = text.splitlines()
    assert len(lines) == 10
    assert lines[3].startswith("step 4/10  loss 2.3457  1,234 tokens/s  ")
    assert lines[9].endswith("0 s left")
    assert "\x1b" not in text, "no escape sequences in a log"


def test_plain_lines_come_now_and_then_but_the_first_and_the_last_always() -> None:
    lines = written(False, list(range(1, 11)), every_s=1000).splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "10/10"]


def test_a_bar_on_a_terminal() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(True, [4, 5, 6], done=3))
    last = [line for line in re.split(r"[\r\n]", text) if line.strip()][-1]
    assert "6/10" in last
    assert "loss 2.3457" in last
    assert "1,234 tokens/s" in last
    assert "left" in last


def test_a_loss_that_is_no_number_is_shown_as_such() -> None:
    stream = io.StringIO()
    tracker = progress(1, 0, Console(file=stream))
    tracker.log(1, {"loss": float("nan"), "tokens_per_s": None})
    assert "loss -  - tokens/s" in stream.getvalue()
