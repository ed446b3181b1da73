"""The benchmark of strategies, on a model small enough for a test."""

import importlib
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from smoke import ROOT, smoke_run


def run(model: Path, figures: Path, *arguments: str) -> list[dict[str, Any]]:
    """The results of a smoke run."""
    usual = ["--quick", "--micro-batch-size", "1", "--model", str(model)]
    done, written = smoke_run("strategies.py", figures, *usual, *arguments)
    if "a slow link needs" in done.stderr:
        assert done.returncode == 2
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = written["results"]
    return results


@pytest.mark.slow
def test_strategies_and_peers_do_the_same_work(tiny_model: Path, tmp_path: Path) -> None:
    results = run(tiny_model, tmp_path / "figures.json", "--only", "FSDP", "shard", "pipeline")
    names = [result["side"] for result in results]
    assert names == ["FSDP2", "FSDP1", "fttrain shard", "fttrain pipeline"]
    losses = results[0]["losses"]
    assert losses[-1] < losses[0]
    for result in results:
        # The first loss is the model's own; the later ones agree only if the updates do.
        assert result["losses"] == pytest.approx(losses, rel=0.01)
        assert result["peak_host_bytes"] > 0
        assert result["sent_bytes_per_step"] > 0


@pytest.mark.slow
@pytest.mark.alone
def test_a_slow_link_slows_what_sends_much(tiny_model: Path, tmp_path: Path) -> None:
    before = namespaces()
    fast, slow = run(tiny_model, tmp_path / "figures.json", "--mbit", "20", "--only", "FSDP2")
    assert (fast["settings"]["mbit"], slow["settings"]["mbit"]) == (None, 20)
    assert slow["losses"] == fast["losses"]
    assert slow["sent_bytes_per_step"] == pytest.approx(fast["sent_bytes_per_step"], rel=0.1)
    # Each rank sends half of the bytes, at 20 Mbit/s.
    assert min(map(min, slow["step_s"])) > 0.8 * slow["sent_bytes_per_step"] / 2 * 8 / 20e6
    assert namespaces() == before


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def result(
    side: str, speeds: list[float], sent: float = 1.0, mbit: float | None = None
) -> dict[str, Any]:
    """Figures as a run makes them; ``speeds`` by turn."""
    own = side.startswith("fttrain")
    return {
        "side": side,
        "settings": {"side": "fttrain" if own else "peer", "mbit": mbit},
        "tokens_per_s": sorted(speeds)[len(speeds) // 2],
        "best_tokens_per_s": max(speeds),
        "turn_tokens_per_s": speeds,
        "peak_host_bytes": 1.0,
        "sent_bytes_per_step": sent,
        "final_loss": 2.0,
    }


@pytest.fixture
def strategies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("strategies")


def test_ratios_are_to_the_fastest_peer_and_to_replicate_turn_by_turn(
    strategies: ModuleType,
) -> None:
    results = strategies.with_ratios(
        [
            result("FSDP2", [100.0]),
            result("FSDP1", [200.0, 400.0, 200.0], sent=8.0),
            result("fttrain replicate", [500.0, 1000.0, 500.0]),
            result("fttrain shard", [450.0, 900.0, 900.0]),
        ]
    )
    shard = results[-1]["ratios"]
    assert shard["tokens_per_s"] == 4.5
    assert shard["sent_bytes_per_step"] == 1 / 8
    assert shard["to_replicate"] == 0.9
    # Speed, memory, bytes, speed beside replicate, loss.
    met = [goal["met"] for goal in strategies.goals(results, None)]
    assert met == [True, False, True, True, True]


def test_what_a_side_keeps_is_its_own_speed_without_the_limit(
    strategies: ModuleType,
) -> None:
    results = strategies.with_ratios(
        [
            result("FSDP2", [100.0], mbit=None),
            result("FSDP2", [40.0], mbit=200),
            result("fttrain shard", [200.0], mbit=None),
            result("fttrain shard", [190.0], mbit=200),
        ]
    )
    assert [goal["met"] for goal in strategies.goals(results, 200)] == [True, True]
    assert results[-1]["ratios"]["tokens_per_s"] == 190 / 40
