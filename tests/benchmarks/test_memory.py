"""The benchmark of memory's levers, on a model small enough for a test."""

from pathlib import Path

import pytest
from smoke import smoke_run


def test_levers_change_no_loss_but_where_they_say(tiny_model: Path, tmp_path: Path) -> None:
    sides = ("peer, with", "default", "nothing skipped", "offload", "adamw8bit", "dora")
    arguments = ("--quick", "--model", str(tiny_model), "--only", *sides)
    done, written = smoke_run("memory.py", tmp_path / "figures.json", *arguments)
    assert done.returncode == 0, done.stderr
    results = {result["side"]: result for result in written["results"]}
    default = results.pop("fttrain default")
    assert default["losses"][-1] < default["losses"][0]
    assert results.pop("peer, with checkpointing")["losses"] == pytest.approx(
        default["losses"], rel=0.01
    )
    for name in ("optim=adamw8bit", "lora=dora"):
        near = results.pop(f"fttrain {name}")["losses"]
        assert near != default["losses"], name
        assert near == pytest.approx(default["losses"], rel=0.01), name
    assert results.keys() == {
        "fttrain nothing skipped",
        "fttrain activations=offload, group=1",
        "fttrain optim.offload",
    }
    for name, result in results.items():
        assert result["losses"] == pytest.approx(default["losses"], rel=1e-4), name
        assert result["ratios"]["tokens_per_s"] > 0
