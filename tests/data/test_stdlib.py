import ast
import importlib
import os
import subprocess
import sys

import pytest

from fttrain.data.stdlib import ANSWER_CHARS, first_paragraph, pairs


def test_two_thousand_distinct_pairs_of_good_length() -> None:
    found = pairs()
    assert 1900 <= len(found) <= 2000
    questions, answers = zip(*found, strict=True)
    assert len(set(questions)) == len(set(answers)) == len(found)
    assert all(ANSWER_CHARS[0] <= len(answer) <= ANSWER_CHARS[1] + 1 for answer in answers)
    assert all(question.count("`") == 2 for question in questions)
    openings = {question.split("`")[0] for question in questions}
    assert len(openings) >= 6


def test_answers_are_the_docstrings() -> None:
    by_name = {question.split("`")[1]: answer for question, answer in pairs(count=10**6)}
    assert by_name["textwrap.dedent"].startswith("Remove any common leading whitespace from every")
    assert by_name["shutil.rmtree"] == "Recursively delete a directory tree."
    checked = 0
    for name, answer in by_name.items():
        module, _, function = name.rpartition(".")
        if module in ("textwrap", "shutil", "fnmatch", "calendar", "math", "cmath"):
            docstring = getattr(importlib.import_module(module), function).__doc__
            assert answer.split()[:3] == docstring.split()[:3]
            checked += 1
    assert checked > 20


def test_the_seed_decides_and_nothing_else() -> None:
    code = "from fttrain.data.stdlib import pairs; print(pairs(5)[:50])"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout == f"{pairs(5)[:50]}\n"
    assert pairs(5) != pairs(6)


def test_modules_are_read_not_run() -> None:
    code = (
        "import sys; from fttrain.data.stdlib import pairs; before = set(sys.modules); pairs();"
        "print(sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(ast.literal_eval(out.stdout))
    assert not {"antigravity", "this", "turtle", "tkinter", "webbrowser", "pydoc"} & imported


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
