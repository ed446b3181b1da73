"""The benchmark of memory's levers, on a model small enough for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_levers_change_no_loss_but_where_they_say(tiny_model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--quick", "--model", str(tiny_model), "--json", str(figures), "--only"]
    sides = ["peer, with", "default", "nothing skipped", "offload", "adamw8bit"]
    done = subprocess.run(
        [sys.executable, "benchmarks/memory.py", *arguments, *sides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = {r["side"]: r for r in json.loads(figures.read_text())["results"]}
    default = results.pop("fttrain default")
    assert default["losses"][-1] < default["losses"][0]
    assert results.pop("peer, with checkpointing")["losses"] == pytest.approx(
        default["losses"], rel=0.01
    )
    eight_bits = results.pop("fttrain optim=adamw8bit")
    assert eight_bits["losses"] != default["losses"]
    assert eight_bits["losses"] == pytest.approx(default["losses"], rel=0.01)
    assert results.keys() == {
        "fttrain nothing skipped",
        "fttrain activations=offload, group=1",
        "fttrain optim.offload",
    }
    for name, result in results.items():
        assert result["losses"] == pytest.approx(default["losses"], rel=1e-4), name
        assert result["ratios"]["tokens_per_s"] > 0
