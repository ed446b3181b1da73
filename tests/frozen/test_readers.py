"""Checkpoints on disk, tensor by tensor, against what transformers loads from them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tiny_files
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fttrain.frozen.readers import GgufReader, Reader, SafetensorsReader, open_checkpoint
from fttrain.frozen.source import Source
from fttrain.util.errors import UserError


def assert_holds(reader: Reader, source: PreTrainedModel) -> None:
    for name, tensor in source.state_dict().items():
        assert reader.has(name), name
        assert torch.equal(reader.tensor(name), tensor), name
    assert not reader.has("model.layers.99.mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"model.layers.99.*missing from the checkpoint"):
        reader.tensor("model.layers.99.mlp.up_proj.weight")


@pytest.mark.parametrize("shard", ["10GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_in_one_file_and_in_shards(
    dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    source = tiny.model().to(dtype)
    source.save_pretrained(tmp_path, max_shard_size=shard)
    files = len(list(tmp_path.glob("*.safetensors")))
    assert (files == 1) is (shard == "10GB")
    reader = open_checkpoint(Source(tmp_path, None), source.config)
    assert_holds(reader, source)
    assert reader.tensor("model.norm.weight").dtype == dtype


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral_full", "qwen2_tied", "qwen3"])
def test_gguf_equals_transformers_own_loading(name: str, tmp_path: Path) -> None:
    # transformers reads no head width for this one: it takes Qwen3's usual 128
    source = tiny.model(name, **({"head_dim": 128} if name == "qwen3" else {}))
    file = tiny_files.write_gguf(source, tmp_path / "tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    reader = open_checkpoint(Source(tmp_path, file.name), source.config)
    for tensor_name, tensor in theirs.state_dict().items():
        if tensor_name == "lm_head.weight" and source.config.tie_word_embeddings:
            continue
        assert torch.equal(reader.tensor(tensor_name), tensor), tensor_name
        # and not only equal to each other: the original within its storage type's precision
        original = source.state_dict()[tensor_name]
        assert float((tensor - original).norm() / original.norm()) < 0.1
    assert not reader.has("model.layers.99.mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"model.layers.2.mlp.w_proj.weight is missing"):
        reader.tensor("model.layers.2.mlp.w_proj.weight")


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.0001, 0.0])
def test_a_truncated_safetensors_file_is_refused(keep: float, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    _truncate(tmp_path / "model.safetensors", keep)
    with pytest.raises(UserError, match=r"model.safetensors: not a whole safetensors file"):
        SafetensorsReader(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    source = tiny.model()
    source.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    _truncate(shard, 0.7)
    reader = SafetensorsReader(tmp_path)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, file in weight_map.items() if file == shard.name)
    with pytest.raises(UserError, match=f"{shard.name}: not a whole safetensors file"):
        reader.tensor(name)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.05, 0.0001, 0.0])
def test_a_truncated_gguf_file_is_refused(keep: float, tmp_path: Path) -> None:
    source = tiny.model()
    file = tiny_files.write_gguf(source, tmp_path / "tiny.gguf")
    _truncate(file, keep)
    with pytest.raises(UserError, match=r"tiny.gguf: not a whole GGUF file"):
        GgufReader(file, source.config)


@pytest.mark.parametrize("start", [b"no model", b"\x89PNG" + bytes(99), b"GGUF\xff\xff\xff\xff"])
def test_a_file_of_another_kind_is_refused(start: bytes, tmp_path: Path) -> None:
    for file in ("model.safetensors", "tiny.gguf"):
        (tmp_path / file).write_bytes(start)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        SafetensorsReader(tmp_path)
    with pytest.raises(UserError, match="not a whole GGUF file"):
        GgufReader(tmp_path / "tiny.gguf", tiny.model().config)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model.safetensors nor an index"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/outside.safetensors", "sub/in.safetensors", "gone", ".."]
)
def test_an_index_stays_in_its_folder(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "in.safetensors"):
        place.write_bytes(b"")
    _write_index(folder, {"weight_map": {"w": shard}})
    with pytest.raises(UserError, match=r"index.json: .* is not a file in this folder"):
        SafetensorsReader(folder)


@pytest.mark.parametrize("index", [{}, [], {"weight_map": [1]}, {"weight_map": {"w": 3}}, "{"])
def test_a_broken_index_is_refused(index: Any, tmp_path: Path) -> None:
    _write_index(tmp_path, index)
    with pytest.raises(UserError, match=r"index.json: not an index of shards|is not a file in"):
        SafetensorsReader(tmp_path)


def _write_index(folder: Path, index: Any) -> None:
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)


def _truncate(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("storage", ["F64", "I8", "I32"])
def test_a_storage_type_that_cannot_be_read_is_named(storage: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    kind = {"F64": np.float64, "I8": np.int8, "I32": np.int32}[storage]
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GgufReader(file, tiny.model().config)
    with pytest.raises(UserError, match=rf"tiny.gguf: tensor model.norm.weight .*as {storage}, "):
        reader.tensor("model.norm.weight")


def test_a_gguf_whose_rope_scaling_would_get_lost_is_refused(tmp_path: Path) -> None:
    source = tiny.model()
    factors = np.linspace(1, 8, source.config.head_dim // 2, dtype=np.float32)
    file = tiny_files.write_gguf(source, tmp_path / "tiny.gguf", rope_freqs=factors)
    with pytest.raises(UserError, match=r"rope_freqs.weight scales the rotary frequencies"):
        GgufReader(file, source.config)
    scaled = tiny.model()
    scaled.config.rope_parameters["rope_type"] = "llama3"
    GgufReader(file, scaled.config)  # a configuration that says it is believed
