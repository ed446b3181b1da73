"""The benchmarks of kernels on a card: what they compute and say, in little, and without a card."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tiny_liger
import torch
from smoke import quick_run

Module = Callable[[str], ModuleType]
SCRIPTS = ["gpu_functions.py", "gpu_head.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: they would measure it")
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_card_one_line_says_so(script: str, tmp_path: Path) -> None:
    done, figures = quick_run(script, tmp_path / "figures.json")
    assert (done.returncode, figures) == (1, {})
    assert done.stderr.splitlines()[-1] == f"{script}: nothing was measured: no CUDA device"


@pytest.mark.liger
@pytest.mark.parametrize("device", tiny_liger.DEVICES)
def test_functions_are_measured_by_both_kinds_of_kernels(
    module: Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, device: str
) -> None:
    tiny_liger.prepare(monkeypatch, device)
    gpu_functions, card = module("gpu_functions"), module("harness.card")
    monkeypatch.setattr(gpu_functions, "CALLS", 1)
    shape, where = gpu_functions.Shape("tiny", 64, 96, 4, 2, 32), torch.device(device)
    results = gpu_functions.measured(shape, 3, 2, gpu_functions.SIDES, where)
    assert len(results) == 7
    for result in results:
        assert result["ratio"] > 0
        assert all(len(result[side]["seconds"]) == 2 for side in gpu_functions.SIDES)
        assert 0 < result["liger"]["peak_bytes"] <= result["torch"]["peak_bytes"]
    norm = results[0]
    assert norm["moved_bytes"] == 2 * (3 * 64 * 2)
    gpu_functions.show(results, "tiny", card.environment(where))
    assert "tiny: SwiGLU, backward" in capsys.readouterr().out


@pytest.mark.liger
@pytest.mark.parametrize("device", tiny_liger.DEVICES)
def test_heads_agree_and_a_peer_that_is_missing_is_named(
    module: Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, device: str
) -> None:
    tiny_liger.prepare(monkeypatch, device)
    gpu_head, card = module("gpu_head"), module("harness.card")
    monkeypatch.setattr(gpu_head, "PEERS", {"Liger": "liger_kernel", gpu_head.CUT: "not_there"})
    results = gpu_head.measured(300, 64, 40, 2, torch.device(device))
    ours, liger, missing = results
    assert (ours["side"], ours["ratio"], ours["loss_apart"]) == ("fttrain", 1.0, 0.0)
    assert abs(liger["loss_apart"]) < 0.01
    assert liger["gradient_apart"] < 0.02
    assert missing["missing"] == "not installed"
    gpu_head.show(results, "tiny", card.environment(torch.device(device)))
    assert "not installed" in capsys.readouterr().out


def test_hidden_states_lean_towards_their_targets(module: Module) -> None:
    """So far that the mean loss is near that of a trained model, whatever the size."""
    gpu_head = module("gpu_head")
    for width in (512, 1024):
        table, norm, hidden, targets = gpu_head.inputs(8000, width, 200, torch.device("cpu"))
        normed = gpu_head.rms_norm(hidden, norm, gpu_head.EPS)
        loss = torch.nn.functional.cross_entropy((normed @ table.t()).float(), targets)
        assert float(loss) == pytest.approx(gpu_head.LOSS_NATS, abs=0.3)
