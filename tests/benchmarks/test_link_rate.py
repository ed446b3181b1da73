"""The benchmark of measured rates: its goals, and where nothing can be measured."""

import importlib
import subprocess
import sys

import pytest
from smoke import ROOT


def test_a_rate_that_is_off_by_more_than_a_tenth_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    link_rate = importlib.import_module("link_rate")
    results = [
        {"mbit": 200.0, "measured_mbit": {"all_reduce": 181.0, "broadcast": 219.0}},
        {"mbit": 800.0, "measured_mbit": {"all_reduce": 800.0, "broadcast": 719.0}},
    ]
    assert [goal["met"] for goal in link_rate._goals(results)] == [True, False]


def test_without_the_tools_it_says_that_nothing_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    done = subprocess.run(
        [sys.executable, "benchmarks/link_rate.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr.startswith("link_rate.py: nothing was measured: a slow link needs `ip`")
