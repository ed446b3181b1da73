"""``fttrain plan`` from a config.json alone: the table, plan.json, the exit code."""

import json
from pathlib import Path

import pytest
import tiny
from transformers import LlamaConfig

from fttrain.cli import main

RIG = "rig.profile=one_24gb"


def arguments(folder: Path, *more: str) -> list[str]:
    return ["plan", f"model.path={folder}", f"output={folder / 'run'}", "data.seq_len=64", *more]


def test_a_plan_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model(num_hidden_layers=5).config.save_pretrained(tmp_path)
    small = ("loop.micro_batch_size=1", "loop.gradient_accumulation_steps=1", "loop.max_steps=10")
    assert main(arguments(tmp_path, RIG, *small)) == 0
    printed = capsys.readouterr().out
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    winner = plan["candidates"][0]
    assert winner["fits"]
    assert winner["settings"] in " ".join(printed.split())
    assert plan["rig"] == "one_24gb"
    assert winner["ranks"][0]["device_bytes"]["frozen layers"] > 0


def test_a_model_that_is_too_big_is_refused_with_what_is_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaConfig(
        hidden_size=32768, intermediate_size=131072, num_hidden_layers=200, vocab_size=200_000
    ).save_pretrained(tmp_path)
    assert main(arguments(tmp_path, "rig.profile=one_16gb")) != 0
    captured = capsys.readouterr()
    assert "does not fit one_16gb; nearest is strategy=" in captured.err
    assert "GiB" in captured.err
    assert "short" in captured.out
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert not any(candidate["fits"] for candidate in plan["candidates"])


def test_a_hub_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["plan", "model.path=nobody/nothing", RIG, f"output={tmp_path}"]) != 0
    assert "model.path=nobody/nothing: not a folder here" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
