"""The benchmark of memory's levers, on a model small enough for a test."""

from pathlib import Path

import pytest
from smoke import smoke_run


@pytest.mark.slow
def test_levers_change_no_loss_but_where_they_say(tiny_model: Path, tmp_path: Path) -> None:
    sides = ("peer, with", "default", "activations=offload", "adamw8bit")
    arguments = ("--quick", "--model", str(tiny_model), "--only", *sides)
    done, written = smoke_run("memory.py", tmp_path / "figures.json", *arguments)
    assert done.returncode == 0, done.stderr
    results = {result["side"]: result for result in written["results"]}
    default = results.pop("fttrain default")
    assert default["losses"][-1] < default["losses"][0]
    assert results.pop("peer, with checkpointing")["losses"] == pytest.approx(
        default["losses"], rel=0.01
    )
    near = results.pop("fttrain optim=adamw8bit")["losses"]
    assert near != default["losses"]
    assert near == pytest.approx(default["losses"], rel=0.01)
    (offload,) = results.values()
    assert offload["side"] == "fttrain activations=offload, group=1"
    assert offload["losses"] == pytest.approx(default["losses"], rel=1e-4)
    assert offload["ratios"]["tokens_per_s"] > 0
