"""The Python API, as a notebook uses it: one process, no launcher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import arguments, inputs

import fttrain
from fttrain.checkpoint.adapter_peft import load_adapter

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory)


def settings(folder: Path, *more: str) -> list[str]:
    return arguments(folder, folder / "run", f"loop.max_steps={STEPS}", *more)[1:]


@pytest.fixture(scope="module")
def result(folder: Path) -> fttrain.TrainResult:
    return fttrain.train(fttrain.load_config(settings(folder)))


def test_importing_it_loads_neither_torch_nor_hydra() -> None:
    program = (
        "import sys, fttrain\n"
        "assert set(fttrain.__all__) <= set(dir(fttrain))\n"
        "assert not {'torch', 'hydra', 'transformers'} & set(sys.modules), sys.modules\n"
        "from fttrain import UserError\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_name_is_there_and_stays_callable_beside_the_package_of_its_name() -> None:
    program = (
        "import fttrain\n"
        "things = {name: getattr(fttrain, name) for name in fttrain.__all__}\n"
        "assert all(map(callable, things.values())), things\n"
        "from fttrain.plan import choose\n"
        "from fttrain.doctor import checks\n"
        "from fttrain import doctor, plan\n"
        "assert callable(doctor) and callable(plan)\n"
        "assert fttrain.plan.choose is choose and fttrain.doctor.checks is checks\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        fttrain.tarin  # noqa: B018
    assert (Path(fttrain.__file__).parent / "py.typed").is_file()


def test_train_returns_what_the_run_leaves(folder: Path, result: fttrain.TrainResult) -> None:
    assert (result.exit_code, result.steps, result.output) == (0, STEPS, folder / "run")
    assert result.exported == folder / "run" / "adapter"
    figures = json.loads((result.output / "evaluation.json").read_text())
    assert result.base_nll == figures["base"]["nll"]
    assert result.tuned_nll == figures["tuned"]["nll"]
    assert result.base_nll != result.tuned_nll


def test_evaluate_returns_the_figures_that_it_writes(
    folder: Path, result: fttrain.TrainResult
) -> None:
    config = fttrain.load_run_config(result.output, ["loop.samples=0"])
    assert config.loop.micro_batch_size == 2, "the run's, not the default"
    evaluation = fttrain.evaluate(config)
    assert evaluation.tuned == json.loads((result.output / "evaluation.json").read_text())["tuned"]
    assert evaluation.tuned is not None
    assert evaluation.tuned["nll"] == pytest.approx(result.tuned_nll)
    assert evaluation.samples == []
    with pytest.raises(fttrain.UserError, match="no run is there"):
        fttrain.load_run_config(folder / "nowhere")


def test_export_writes_the_newest_snapshot(folder: Path, result: fttrain.TrainResult) -> None:
    config = fttrain.load_run_config(result.output)
    exported, info = load_adapter(fttrain.export(config, folder / "exported"))
    at_the_end, expected = load_adapter(result.output / "adapter")
    assert info == expected
    assert exported.keys() == at_the_end.keys()
    assert all(torch.equal(exported[name], at_the_end[name]) for name in exported)
    assert fttrain.export(config) == result.exported
    elsewhere = fttrain.load_config(settings(folder, f"output={folder / 'nowhere'}"))
    with pytest.raises(fttrain.UserError, match="no run is there"):
        fttrain.export(elsewhere)
    assert not (folder / "nowhere").exists()


def test_plan_returns_the_content_of_plan_json(folder: Path) -> None:
    output = folder / "planned"
    config = fttrain.load_config(
        settings(folder, f"output={output}", "rig.profile=one_24gb", "loop.micro_batch_size=1")
    )
    plan = fttrain.plan(config)
    assert plan["candidates"][0]["fits"]
    assert plan["rig"] == "one_24gb"
    assert not output.exists()


def test_doctor_returns_every_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [("fine", lambda: fttrain.Finding("ok", "as it should be")), ("broken", lambda: 1 / 0)]
    monkeypatch.setattr("fttrain.training.diagnosis.all_checks", lambda rig, wanted: checks)
    (fine, good), (broken, bad) = fttrain.doctor(fttrain.load_config(settings(folder)))
    assert (fine, good.verdict, broken, bad.verdict) == ("fine", "ok", "broken", "failure")


def test_ranks_that_nobody_has_started_are_asked_for_in_vain(folder: Path) -> None:
    config = fttrain.load_config(settings(folder, "launch.processes=2"))
    for function in (fttrain.train, fttrain.evaluate, fttrain.measure):
        with pytest.raises(fttrain.UserError, match="this process is one rank"):
            function(config)
    with pytest.raises(fttrain.UserError, match="dry_run=5"):
        fttrain.train(fttrain.load_config(settings(folder, "dry_run=5")))
