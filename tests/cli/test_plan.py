"""``fttrain plan`` from a config.json alone: the table, plan.json, the exit code."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import tiny
import tiny_files
from transformers import LlamaConfig

from fttrain.cli import main
from fttrain.data.config import DataConfig
from fttrain.data.dataset import prepare
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import load_tokenizer
from fttrain.plan.rigs import find_rig
from fttrain.strategy.spec import StrategySpec

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


def test_a_row_has_as_many_documents_as_the_data_says_once_it_is_tokenised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, cache = tiny_files.save(tiny.model(num_hidden_layers=2), tmp_path), tmp_path / "cache"
    data = tiny_files.write_data(tmp_path / "data.jsonl")
    own = DataConfig("file", str(data), seq_len=512, cache_dir=str(cache))
    settings = ("loop.micro_batch_size=1", "loop.gradient_accumulation_steps=1")
    named = ("data=file", f"data.path={data}", "data.seq_len=512", f"data.cache_dir={cache}")

    def planned() -> tuple[int, str]:
        assert main(arguments(model, RIG, *settings, *named)) == 0
        plan = json.loads((tmp_path / "run" / "plan.json").read_text())
        [on_card] = (rank["device_bytes"] for rank in plan["candidates"][0]["ranks"])
        return sum(on_card.values()), " ".join(capsys.readouterr().out.split())

    guessed_bytes, said = planned()
    assert "full rows, one document each" in said
    made = prepare(own, *load_tokenizer(ModelConfig("local", str(model))))
    most = max(len(row) for row in made.train)
    known_bytes, said = planned()
    assert f"full rows, up to {most} document(s) each" in said
    assert known_bytes > guessed_bytes


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
    assert "no smaller rows, no lower rank and no rig" in captured.err
    assert "no: card 0 +" in " ".join(captured.out.split())
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert not any(candidate["fits"] for candidate in plan["candidates"])


def test_the_nearest_thing_that_fits_is_named_and_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.model(num_hidden_layers=2, max_position_embeddings=4096).config.save_pretrained(tmp_path)
    small = ["loop.micro_batch_size=1", "loop.gradient_accumulation_steps=1", "lora.r=8"]
    rig = find_rig("one_24gb")

    def plan(memory_bytes: int, *settings: str) -> int:
        card = replace(rig.cards[0], memory_bytes=memory_bytes, overhead_bytes=0)
        replace(rig, cards=(card,)).save(tmp_path / "own.json")
        own = f"rig.profile={tmp_path / 'own.json'}"
        return main(arguments(tmp_path, own, *small, "data.seq_len=2048", *settings))

    assert plan(1 << 40) == 0
    planned = json.loads((tmp_path / "run" / "plan.json").read_text())["candidates"]
    least = min(sum(one["ranks"][0]["device_bytes"].values()) for one in planned)
    capsys.readouterr()
    assert plan(least * 3 // 4) != 0
    told = re.search(r"it fits with (\S+=.*)", capsys.readouterr().err)
    assert told
    assert plan(least * 3 // 4, *told[1].split()) == 0


@pytest.mark.slow
def test_a_shipped_model_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a socket is opened")

    def configured_only(spec: StrategySpec, world_size: int) -> Iterator[StrategySpec]:
        yield spec  # one candidate of dozens: the test is quick

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("fttrain.plan.choose.candidates", configured_only)
    settings = ("model=llama3_70b", "rig.profile=2x3090_nvlink", "strategy=stream")
    small = ("loop.micro_batch_size=1", "loop.gradient_accumulation_steps=1")
    assert main(["plan", *settings, *small, f"output={tmp_path}"]) == 0
    assert "strategy=stream" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["candidates"][0]["fits"]


def test_a_hub_behind_a_closed_port(tmp_path: Path) -> None:
    """A process of its own, for the hub's address is read when its client is imported."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "fttrain", "plan", "model.path=nobody/nothing", RIG]
    ended = subprocess.run(
        [*command, f"output={tmp_path / 'run'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode not in (0, None)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("fttrain: error")]
    assert "model.path=nobody/nothing: not a folder here, and the hub did not deliver it" in line
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_hub_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["plan", "model.path=nobody/nothing", RIG, f"output={tmp_path}"]) != 0
    assert "model.path=nobody/nothing: not a folder here" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
