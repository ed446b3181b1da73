"""The script over the Python API trains, evaluates and exports a tiny model."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import tiny_run
from safetensors.torch import load_file

FILE = Path(__file__).resolve().parents[2] / "examples" / "python_api.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("python_api", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_evaluates_and_exports(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run.inputs(tmp_path_factory)
    output = folder / "run"
    _, *settings, _ = tiny_run.arguments(folder, output)
    result = script().main(output, [*settings, "loop.max_steps=8", "rig.device=cpu"])
    assert (result.exit_code, result.steps, result.output) == (0, 8, output)
    assert result.tuned_nll < result.base_nll
    printed = capsys.readouterr().out
    assert f"exported to {output / 'exported'}" in printed
    trained, exported = (
        load_file(path / "adapter_model.safetensors")
        for path in (result.exported, output / "exported")
    )
    assert trained.keys() == exported.keys()
    assert all(trained[name].equal(exported[name]) for name in trained)
