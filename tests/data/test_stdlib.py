import json
import os
import subprocess
import sys

import pytest

from fttrain.data.stdlib import ANSWER_CHARS, PAIRS, first_paragraph, pairs

PROGRAM = """
import json, sys
from fttrain.data.stdlib import pairs
before = set(sys.modules)
print(json.dumps([pairs(5), sorted(set(sys.modules) - before)]))
"""


def test_the_seed_decides_and_nothing_else() -> None:
    """Another process reads the same pairs, and runs no module that it reads."""
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    others, imported = json.loads(done.stdout)
    found = pairs(5)
    # The first ones alone: pytest replaces functions of sys that have a docstring.
    assert [list(pair) for pair in found[:50]] == others[:50]
    assert not {"antigravity", "this", "turtle", "tkinter", "webbrowser", "pydoc"} & {*imported}
    assert pairs(6) != found
    assert len(found) <= PAIRS
    assert all(len(set(texts)) == len(found) for texts in zip(*found, strict=True))
    assert all(ANSWER_CHARS[0] <= len(answer) <= ANSWER_CHARS[1] + 1 for _, answer in found)


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Return the thing as it is.\n\nMore.", "Return the thing as it is."),
        ("Return the\n    thing as it is", "Return the thing as it is."),
        ("Too short.", None),
        ("dict() -> new empty dictionary", None),
        ("f(x, y=2)\nReturn something of them.", None),
        (">>> an example of the thing", None),
        ("The possible values of it are:", None),
        ("", None),
        ("word " * 200, None),
    ],
)
def test_first_paragraph(docstring: str, answer: str | None) -> None:
    assert first_paragraph(docstring) == answer
