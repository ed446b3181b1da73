"""Runs that leave their strategy or activations to the planner, and the plan that is kept."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_cpu_rig
import tiny_files
import yaml
from tiny_run import Fault, adapter, arguments, exit_codes, losses, two_ranks

from fttrain.cli import main
from fttrain.config.run_config import compose
from fttrain.training.auto_plan import link_table, resolve_auto

ONE_ROW = ("loop.micro_batch_size=1", "loop.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four layers with its tokenizer, and a data set."""
    place = tmp_path_factory.mktemp("planned")
    tiny_files.save(tiny.model("llama_tied", num_hidden_layers=4), place / "model")
    tiny_files.write_data(place / "data.jsonl")
    return place


def plan_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "plan.json").read_text())
    return found


def settings_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((output / "config.yaml").read_text())
    return found


def test_a_run_under_auto_stopped_and_resumed_is_the_run_with_its_settings_written_out(
    folder: Path, tmp_path: Path
) -> None:
    """On two ranks whose sums are slow, so that the planner does not take the default."""
    rig = tiny_cpu_rig.saved(tmp_path, tiny_cpu_rig.rig(cards=2, sums_bytes_per_s=1e3))
    common = (rig, "loop.max_steps=3", "data.holdout=0", *ONE_ROW)
    auto, written = tmp_path / "auto", tmp_path / "written"
    with two_ranks() as start:
        argv = arguments(folder, auto, *common, "strategy=auto")
        stop = Fault(rank=1, step=1, signum=signal.SIGTERM)
        assert exit_codes(start(argv, stop)) == [143, 143]
        chosen = plan_of(auto)["ran"].split()
        assert "strategy=pipeline" in chosen
        assert settings_of(auto)["strategy"]["name"] == "pipeline"
        assert exit_codes(start(argv)) == [0, 0]
        assert exit_codes(start(arguments(folder, written, *common, *chosen))) == [0, 0]
    assert losses(auto) == losses(written)
    assert tiny.difference(adapter(auto), adapter(written)) == 0
    assert {**settings_of(auto), "output": ""} == {**settings_of(written), "output": ""}
    plan, alone = plan_of(auto), plan_of(written)
    assert len(plan["candidates"]) > len(alone["candidates"]) == 1
    assert plan["ran"] == alone["ran"] == plan["candidates"][0]["settings"]
    predicted = plan["candidates"][0]["predicted"]
    assert predicted == alone["candidates"][0]["predicted"]
    # of data whose prompts are masked: the candidates were compared as if nothing were
    assert 0 < predicted["step_s"] < plan["candidates"][0]["step_s"]
    assert alone["candidates"][0]["measured"]["peak_host_bytes"] > 1e8
    assert "## Plan and measured" in (auto / "report.md").read_text()


def test_train_dry_run_and_evaluate_take_the_same_activations(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = tiny_cpu_rig.saved(tmp_path, tiny_cpu_rig.rig())
    output = tmp_path / "run"
    argv = arguments(folder, output, rig, *ONE_ROW, "loop.max_steps=1", "activations=auto")
    assert main([*argv, "dry_run=3"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "activations=auto: " in line]
    assert not output.exists()
    assert main(argv) == 0
    assert said[0] in capsys.readouterr().out
    assert settings_of(output)["activations"] == "keep"
    assert "strategy=replicate schedule.micro_batch_group=all activations=keep" in said[0]
    before = json.loads((output / "evaluation.json").read_text())
    again = ["evaluate", f"output={output}", "activations=auto", rig]
    assert main(again) == 0
    assert json.loads((output / "evaluation.json").read_text())["tuned"] == before["tuned"]


@pytest.mark.parametrize("asked", ["strategy=auto", "activations=auto"])
def test_what_cannot_be_chosen_is_refused_before_anything_is_loaded(
    asked: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = tiny_cpu_rig.saved(tmp_path, tiny_cpu_rig.rig(cards=2))
    (tmp_path / "small").mkdir()
    small = tiny_cpu_rig.saved(tmp_path / "small", tiny_cpu_rig.rig(memory_bytes=10_000))
    for rig, said in {
        "rig.profile=measured": (f"{asked} needs a rig's profile", "`fttrain measure`", "2x4090"),
        cards: (f"{asked}: ", "2 card(s), the run 1 rank(s)", "measure launch.processes=1"),
        small: (f"{asked}: local does not fit made up; nearest is strategy=", "GiB"),
    }.items():
        own = (rig, asked, f"data.cache_dir={tmp_path}/data", f"frozen.cache_dir={tmp_path}/frozen")
        assert main(arguments(folder, tmp_path / "run", *own)) != 0
        error = capsys.readouterr().err
        assert all(part in error for part in said), error
        assert "Traceback" not in error
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "data").exists()
        assert not (tmp_path / "frozen" / "frozen").exists()


def test_a_run_that_does_not_fit_by_its_plan_is_warned_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = tiny_cpu_rig.saved(tmp_path, tiny_cpu_rig.rig(memory_bytes=10_000))
    output = tmp_path / "run"
    assert main(arguments(folder, output, rig, "loop.max_steps=1", "data.holdout=0")) == 0
    assert "warning: by its plan this run does not fit made up: " in capsys.readouterr().err
    (ours,) = plan_of(output)["candidates"]
    assert not ours["fits"]
    assert ours["measured"]["step_s"] > 0


def test_without_a_profile_that_says_something_there_is_no_plan(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"frozen.cache_dir={tmp_path}"
    for rig in ("rig.profile=measured", tiny_cpu_rig.saved(tmp_path, tiny_cpu_rig.rig(cards=2))):
        config = compose(arguments(folder, tmp_path / "run", own, rig)[1:])
        assert resolve_auto(config) == (config, None)
        assert capsys.readouterr().out == ""
    (tmp_path / "rig.json").write_text("{}")
    config = compose(arguments(folder, tmp_path / "run", own)[1:])
    assert resolve_auto(config) == (config, None)
    assert "warning: the run is not planned: " in capsys.readouterr().err


def test_a_plan_of_what_is_left_open_starts_from_the_defaults() -> None:
    """So `fttrain plan strategy=auto` plans as `fttrain plan` does."""
    left_open = compose(["strategy=auto", "activations=auto", "layer_inputs=host"])
    assert left_open.left_open == ("strategy", "activations")
    assert left_open.strategy_spec() == compose(["layer_inputs=host"]).strategy_spec()
    assert (
        compose(["strategy=pipeline", "activations=auto"]).strategy_spec()
        == compose(["strategy=pipeline"]).strategy_spec()
    )


def test_the_links_of_the_rig_that_the_run_names(tmp_path: Path) -> None:
    nvlink = compose(["rig.profile=2x3090_nvlink"])
    columns, rows = link_table(nvlink, 2)["links"]
    assert columns == ["figure", "default"]
    assert rows[0] == ["carried by", "NVLink"]
    bandwidth = {name: float(rate) for name, rate in rows[1:] if rate != "-"}
    assert bandwidth["all_reduce, bus GB/s at best"] == pytest.approx(56, abs=0.1)
    assert link_table(nvlink, 1) == {}, "of another number of ranks"
    assert link_table(compose([f"frozen.cache_dir={tmp_path}"]), 2) == {}, "nothing was measured"
