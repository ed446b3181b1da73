"""Checkpoint -> frozen base: bitsandbytes' bytes are taken unchanged; little is alive at once."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import tiny
import tiny_files
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from fttrain.data.batch import collate
from fttrain.frozen.quantize_layer import check_head, check_quantisation, load_layer
from fttrain.frozen.readers import SafetensorsReader, open_checkpoint
from fttrain.frozen.source import Source, load_config, quantisation_of
from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture, Decoder
from fttrain.model.projection import ResidentHead
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.store.resident import ResidentStore
from fttrain.util.errors import UserError

LORA = LoraConfig(r=4)


def prequantised(folder: Path, kind: str = "nf4", double_quant: bool = True) -> PreTrainedModel:
    """A checkpoint that transformers quantised and saved; the loaded model."""
    tiny.model("qwen2").save_pretrained(folder / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant
    )
    quantised = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    quantised.save_pretrained(folder)
    return quantised


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_prequantised_checkpoint_is_taken_unchanged(
    kind: str, double_quant: bool, tmp_path: Path
) -> None:
    quantised = prequantised(tmp_path, kind, double_quant)
    source, quant = Source(tmp_path, None), QuantConfig(kind, 64, double_quant)
    check_quantisation(quantisation_of(source), quant)
    architecture = Architecture(load_config(source))
    frozen_format = architecture.frozen_format(quant, torch.float32)
    reader = SafetensorsReader(tmp_path)
    for index, flat in enumerate(tiny.load_layers(reader, architecture, frozen_format, tiny.CPU)):
        views, layer = frozen_format.layout.views(flat), FrozenLayer(flat, frozen_format)
        for group in architecture.groups:
            name = group.shape.name
            paths = [f"model.layers.{index}.{path}" for path in group.paths]
            stored = [reader.tensor(f"{path}.weight").view(-1) for path in paths]
            assert torch.equal(views[f"{name}.packed"], torch.cat(stored))
            absmax = [reader.tensor(f"{path}.weight.absmax") for path in paths]
            assert torch.equal(views[f"{name}.absmax"], torch.cat(absmax))
            weights = [quantised.get_submodule(path).weight for path in paths]
            theirs = [bnb.dequantize_4bit(w.data, w.quant_state) for w in weights]
            assert torch.equal(layer.weight(name), torch.cat(theirs))


def test_a_prequantised_checkpoint_has_transformers_logits(tmp_path: Path) -> None:
    quantised = prequantised(tmp_path)
    source, quant = Source(tmp_path, None), QuantConfig("nf4", 64, True)
    architecture = Architecture(load_config(source))
    frozen_format = architecture.frozen_format(quant, torch.float32)
    reader = SafetensorsReader(tmp_path)
    embedding, norm, head = tiny.load_ends(reader, architecture, tiny.CPU, torch.float32)
    flats = tiny.load_layers(reader, architecture, frozen_format, tiny.CPU)
    decoder = Decoder(
        architecture, embedding, norm, ResidentHead(head), tiny.adapters(architecture, LORA)
    )
    document = tiny.documents((23,))
    ours = tiny.logits(decoder, ResidentStore(flats, frozen_format), collate(document, 0))
    with torch.no_grad():
        # With gradients on, bitsandbytes leaves its packed weights as they are.
        theirs = quantised.train()(input_ids=torch.tensor([document[0][0]])).logits[0]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "fp4"}, "quant=nf4 quant.double_quant=true reads it as it is"),
        ({"double_quant": False}, "quant=nf4 quant.double_quant=true reads it as it is"),
        ({"kind": "none", "double_quant": False}, "quant=nf4 quant.double_quant=true"),
    ],
)
def test_settings_other_than_the_checkpoints_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    stored = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    check_quantisation(None, QuantConfig(**settings))
    check_quantisation(stored, QuantConfig())
    with pytest.raises(UserError, match=message):
        check_quantisation(stored, QuantConfig(**settings))


@pytest.mark.parametrize(
    "stored",
    [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_8bit": True}],
    ids=str,
)
def test_other_quantisation_is_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{stored['quant_method']}.*only 4-bit bitsandbytes"):
        check_quantisation(stored, QuantConfig())


def test_another_block_size_or_scale_code_is_refused(tmp_path: Path) -> None:
    prequantised(tmp_path)
    architecture = Architecture(load_config(Source(tmp_path, None)))

    def load(quant: QuantConfig) -> None:
        frozen_format = architecture.frozen_format(quant, torch.float32)
        load_layer(SafetensorsReader(tmp_path), architecture, frozen_format, 0, tiny.CPU)

    with pytest.raises(UserError, match=r"q_proj.*quantised with quant.blocksize=64, not 32"):
        load(QuantConfig(blocksize=32))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if name.endswith("nested_quant_map"):
            tensors[name] = tensors[name] * 2
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="a code or block size other than bitsandbytes"):
        load(QuantConfig())


def said(state: dict[str, Any]) -> Tensor:
    """As bitsandbytes stores what it says of a weight."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


STATE = "quant_state.bitsandbytes__nf4"
FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "no JSON": (STATE, lambda t: t[:-3], f"{STATE}: not what bitsandbytes writes"),
    "no bytes": (STATE, lambda t: t.float(), f"{STATE}: not what bitsandbytes writes"),
    "no shape": (STATE, lambda t: said({"blocksize": 64}), f"{STATE}: not what .*'shape'"),
    "no number": (STATE, lambda t: said({"shape": 7}), f"{STATE}: not what bitsandbytes writes"),
    "packed short": ("", lambda t: t[:-1], r": shape \(2047,\).*\(2048,\) expected"),
    "absmax short": ("absmax", lambda t: t[:-1], r"absmax: shape \(63,\).*\(64,\) expected"),
    "absmax fp32": ("absmax", lambda t: t.float(), r"absmax: torch.float32 .*uint8 expected"),
    "nested long": ("nested_absmax", lambda t: t.repeat(2), r"nested_absmax: shape \(2,\)"),
    "code short": ("nested_quant_map", lambda t: t[:9], r"nested_quant_map: shape \(9,\)"),
    "code half": ("nested_quant_map", lambda t: t.half(), r"nested_quant_map: torch.float16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bytes_of_bitsandbytes_that_do_not_fit_are_refused_by_name(
    fault: str, tmp_path: Path
) -> None:
    prequantised(tmp_path)
    part, break_it, message = FAULTS[fault]
    tensors = load_file(tmp_path / "model.safetensors")
    name = ".".join(filter(None, ("model.layers.1.self_attn.q_proj.weight", part)))
    tensors[name] = break_it(tensors[name]).clone()
    save_file(tensors, tmp_path / "model.safetensors")
    architecture = Architecture(load_config(Source(tmp_path, None)))
    frozen_format = architecture.frozen_format(QuantConfig(), torch.float32)
    reader = SafetensorsReader(tmp_path)
    load_layer(reader, architecture, frozen_format, 0, tiny.CPU)
    with pytest.raises(UserError, match=rf"model.layers.1.self_attn.q_proj.weight\.?{message}"):
        load_layer(reader, architecture, frozen_format, 1, tiny.CPU)


def test_packed_codes_are_the_same_bytes_under_any_dtype(tmp_path: Path) -> None:
    """bitsandbytes' quant_storage: FSDP wants them as bf16."""
    prequantised(tmp_path)
    architecture = Architecture(load_config(Source(tmp_path, None)))
    frozen_format = architecture.frozen_format(QuantConfig(), torch.float32)
    usual = load_layer(SafetensorsReader(tmp_path), architecture, frozen_format, 0, tiny.CPU)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = tensor.view(-1).view(torch.bfloat16).view(-1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    other = load_layer(SafetensorsReader(tmp_path), architecture, frozen_format, 0, tiny.CPU)
    assert torch.equal(usual, other)


@pytest.mark.parametrize("quant", [QuantConfig(), tiny.PLAIN], ids=["nf4", "none"])
@pytest.mark.parametrize("name", ["llama_bias", "qwen3"])
def test_a_missing_or_misshapen_tensor_is_named(name: str, quant: QuantConfig) -> None:
    source = tiny.model(name)
    architecture = Architecture(source.config)
    frozen_format = architecture.frozen_format(quant, torch.float32)

    def load(tensors: dict[str, Tensor]) -> None:
        reader = tiny.StateDict(tensors)
        tiny.load_ends(reader, architecture, tiny.CPU, torch.float32)
        tiny.load_layers(reader, architecture, frozen_format, tiny.CPU)

    state = source.state_dict()
    load(state)
    for tensor_name, tensor in state.items():
        with pytest.raises(UserError, match=f"{tensor_name} is missing"):
            load({n: t for n, t in state.items() if n != tensor_name})
        wrong = torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:])
        with pytest.raises(UserError, match=rf"{tensor_name}: shape .*in the checkpoint, .*expec"):
            load({**state, tensor_name: wrong})


def test_rows_that_are_no_whole_number_of_blocks_are_refused_by_name() -> None:
    source = tiny.model(intermediate_size=96)
    with pytest.raises(UserError, match=r"layers.0.mlp.down_proj.weight.*96.*quant.blocksize=64"):
        tiny.build(source, QuantConfig())


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_head_that_the_configuration_speaks_of_must_be_there(name: str) -> None:
    source = tiny.model(name)
    architecture, tensors = Architecture(source.config), source.state_dict()
    check_head(tiny.StateDict(tensors), architecture, "here")
    del tensors["lm_head.weight"]
    if name == "llama_tied":
        check_head(tiny.StateDict(tensors), architecture, "here")
    else:
        with pytest.raises(UserError, match=r"here: tensor lm_head.weight is missing.*tie_word"):
            check_head(tiny.StateDict(tensors), architecture, "here")


class Counting:
    """A reader that knows how many bytes of what it handed out are still alive."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.alive_bytes, self.peak_bytes = tensors, 0, 0

    def has(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        handed_out = self.tensors[name].clone()
        size_bytes = handed_out.nbytes
        self.alive_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(handed_out, self._gone, size_bytes)
        return handed_out

    def rest(self) -> None:
        """Nothing is mapped."""

    def _gone(self, size_bytes: int) -> None:
        self.alive_bytes -= size_bytes


@pytest.mark.parametrize("quant", [QuantConfig(), tiny.PLAIN], ids=["nf4", "none"])
def test_no_more_than_one_unquantised_layer_is_alive(quant: QuantConfig) -> None:
    source = tiny.model("qwen2", num_hidden_layers=8)
    reader = Counting(source.state_dict())
    architecture = Architecture(source.config)
    frozen_format = architecture.frozen_format(quant, torch.float32)
    flats = tiny.load_layers(reader, architecture, frozen_format, tiny.CPU)
    layer_bytes = sum(p.nbytes for n, p in reader.tensors.items() if ".layers.0." in n)
    assert len(flats) == 8
    assert 0 < reader.peak_bytes <= layer_bytes
    assert reader.alive_bytes == 0


def test_gguf_and_safetensors_make_the_same_base(tmp_path: Path) -> None:
    """All the way from a GGUF file to logits, with q and k put back in order."""
    source = tiny.model("mistral_full")
    file = tiny_files.write_gguf(source, tmp_path / "tiny.gguf")
    reader = open_checkpoint(Source(tmp_path, file.name), source.config)
    architecture = Architecture(source.config)
    frozen_format = architecture.frozen_format(tiny.PLAIN, torch.float32)
    embedding, norm, head = tiny.load_ends(reader, architecture, tiny.CPU, torch.float32)
    flats = tiny.load_layers(reader, architecture, frozen_format, tiny.CPU)
    decoder = Decoder(
        architecture, embedding, norm, ResidentHead(head), tiny.adapters(architecture, LORA)
    )
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    document = tiny.documents((23,))
    ours = tiny.logits(decoder, ResidentStore(flats, frozen_format), collate(document, 0))
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor([document[0][0]])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_index_json_is_read_as_data(tmp_path: Path) -> None:
    """The quantisation of a checkpoint comes from its config.json; a GGUF file has none."""
    stored = {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored}))
    assert quantisation_of(Source(tmp_path, None)) == stored
    assert quantisation_of(Source(tmp_path, "model.gguf")) is None
