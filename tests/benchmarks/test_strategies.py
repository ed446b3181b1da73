"""The benchmark of strategies, on a model small enough for a test."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(model: Path, figures: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "benchmarks/strategies.py", "--quick", "--model", str(model)]
        + ["--micro-batch-size", "1", "--json", str(figures), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "a slow link needs" in done.stderr:
        assert done.returncode == 1
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text())


def test_strategies_and_peers_do_the_same_work(tiny_model: Path, tmp_path: Path) -> None:
    written = run(tiny_model, tmp_path / "figures.json")
    names = [result["side"] for result in written["results"]]
    assert [name.split()[-1] for name in names] == [
        *("FSDP2", "FSDP1"),
        *("replicate", "shard", "stream", "pipeline"),
    ]
    losses = [result["losses"] for result in written["results"]]
    assert losses[0][-1] < losses[0][0]
    for result, own in zip(written["results"], losses, strict=True):
        # The first loss is the model's own; the later ones agree only if the updates do.
        assert own == pytest.approx(losses[0], rel=0.01)
        assert result["peak_host_bytes"] > 0
        assert result["sent_bytes_per_step"] > 0
        assert result["ratios"].keys() >= {"tokens_per_s", "final_loss", "to_replicate"}
    assert [goal["met"] for goal in written["goals"]].count(None) == 0


def test_a_slow_link_slows_what_sends_much(tiny_model: Path, tmp_path: Path) -> None:
    written = run(tiny_model, tmp_path / "figures.json", "--mbit", "50", "--only", "shard", "FSDP2")
    results = written["results"]
    assert [result["settings"]["mbit"] for result in results] == [None, 50, None, 50]
    for fast, slow in zip(results[::2], results[1::2], strict=True):
        assert slow["losses"] == fast["losses"]
        assert slow["sent_bytes_per_step"] == pytest.approx(fast["sent_bytes_per_step"], rel=0.1)
        assert slow["ratios"]["kept"] < 1
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "fttrain-" not in names
