"""Whole weights: as a model that transformers loads, and in snapshots."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_files
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fttrain.checkpoint import full_model
from fttrain.checkpoint.full_model import load_weights, save_model
from fttrain.checkpoint.snapshot import Snapshot, load_snapshot, save_snapshot
from fttrain.frozen.source import Source
from fttrain.util.errors import UserError


@pytest.mark.parametrize("name", ["llama", "qwen2_tied"])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_transformers_loads_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shard_bytes: int
) -> None:
    monkeypatch.setattr(full_model, "SHARD_BYTES", shard_bytes)
    model, tokenizer = tiny.model(name), tiny_files.tokenizer()
    source = Source(tiny_files.save(model, tmp_path / "base"), None)
    weights = {key: w.detach() * 1.5 for key, w in model.named_parameters()}
    folder = tmp_path / "model"
    for _ in range(2):  # again over the first
        save_model(folder, weights, model.config, tokenizer, source, torch.bfloat16)
    assert len(list(folder.glob("*.safetensors"))) == (
        1 if shard_bytes > 10**6 else len_shards(folder)
    )
    loaded, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    assert loaded.dtype == torch.bfloat16
    for key, tensor in loaded.named_parameters():
        assert torch.equal(tensor, weights[key].to(torch.bfloat16)), key
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    again = load_weights(folder)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key].bfloat16().float()) for key in weights)


def len_shards(folder: Path) -> int:
    """As the names of the files have it; more than one."""
    counts = {int(file.stem.rpartition("-")[2]) for file in folder.glob("*.safetensors")}
    (count,) = counts
    assert count > 1
    return count


def test_a_snapshot_of_all_weights(tmp_path: Path) -> None:
    weights = {"model.norm.weight": torch.randn(5), "lm_head.weight": torch.randn(7, 5)}
    moments = {"model.norm.weight.exp_avg": torch.randn(5)}
    saved = save_snapshot(tmp_path, Snapshot(3, weights, moments, adapter_info=None))
    found = load_snapshot(saved)
    assert found.adapter_info is None
    assert found.step == 3
    assert all(torch.equal(found.adapter[key], weights[key]) for key in weights)
    bad = replace(found, step=4, adapter={**weights, "lm_head.weight": torch.full((2,), torch.nan)})
    with pytest.raises(UserError, match=r"lm_head.weight holds values that are not finite"):
        save_snapshot(tmp_path, bad)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    model = tiny.model()
    source = Source(tiny_files.save(model, tmp_path / "base"), None)
    weights = {"model.norm.weight": torch.zeros(0)}
    with pytest.raises(UserError, match=r"model.norm.weight is empty"):
        save_model(tmp_path / "model", weights, model.config, None, source, torch.float32)
    with pytest.raises(AttributeError):  # a fault between the first file and the last
        save_model(
            tmp_path / "model",
            dict(model.named_parameters()),
            model.config,
            None,
            source,
            torch.float32,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
