"""Plain PEFT is the reference: it must load what we save, and we must load what it saves."""

import itertools
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fttrain.checkpoint.adapter_peft import AdapterInfo, load_adapter, save_adapter
from fttrain.util.errors import UserError

HIDDEN, MIDDLE, HEADS, KV_HEADS, LAYERS, R = 16, 24, 4, 2, 2, 3
KV = HIDDEN // HEADS * KV_HEADS
SHAPES = {  # module -> (in, out)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, MIDDLE),
    "mlp.up_proj": (HIDDEN, MIDDLE),
    "mlp.down_proj": (MIDDLE, HIDDEN),
}
LEAVES = tuple(module.partition(".")[2] for module in SHAPES)
SUBSETS = [
    subset
    for count in range(1, len(LEAVES) + 1)
    for subset in itertools.combinations(LEAVES, count)
]


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    return LlamaForCausalLM(config).eval()


def adapter(leaves: tuple[str, ...] = LEAVES, r: int = R) -> dict[str, torch.Tensor]:
    """Random weights under our names; both sides are far from zero."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer in range(LAYERS):
        for module, (n_in, n_out) in SHAPES.items():
            if module.partition(".")[2] in leaves:
                name = f"model.layers.{layer}.{module}"
                state[f"{name}.lora_A"] = torch.randn(r, n_in, generator=generator)
                state[f"{name}.lora_B"] = torch.randn(n_out, r, generator=generator)
    return state


def info(targets: str | tuple[str, ...] = "all-linear", **changes: Any) -> AdapterInfo:
    return AdapterInfo(**{"r": R, "lora_alpha": 7.0, "target_modules": targets, **changes})


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def loaded_by_peft(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base(), folder)


@pytest.mark.parametrize("leaves", SUBSETS, ids="+".join)
def test_peft_loads_every_subset_of_targets(leaves: tuple[str, ...], tmp_path: Path) -> None:
    state = adapter(leaves)
    save_adapter(tmp_path, state, info(leaves), "some/base", "main")
    model = loaded_by_peft(tmp_path)
    theirs = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    keys = {name: f"base_model.model.{name}.default.weight" for name in state}
    assert_same({keys[name]: tensor for name, tensor in state.items()}, theirs)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (R, 7.0, "some/base")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_computes_what_the_formula_says(use_rslora: bool, tmp_path: Path) -> None:
    """W + scale * B A merged by hand into a plain model gives the logits of the PEFT model."""
    state = adapter()
    save_adapter(tmp_path, state, info(use_rslora=use_rslora), "some/base")
    merged, scale = base(), 7.0 / (R**0.5 if use_rslora else R)
    with torch.no_grad():
        for name in state:
            if name.endswith("lora_A"):
                weight = merged.get_submodule(name.removesuffix(".lora_A")).weight
                weight += scale * state[f"{name[:-1]}B"] @ state[name]
    ids = torch.arange(10).reshape(1, -1)
    with torch.no_grad():
        ours, theirs = merged(ids).logits, loaded_by_peft(tmp_path)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def dora() -> dict[str, torch.Tensor]:
    """Magnitudes beside them."""
    generator = torch.Generator().manual_seed(2)
    state = adapter()
    for name in [name for name in state if name.endswith("lora_B")]:
        rows = torch.rand(state[name].shape[0], generator=generator)
        state[name.replace("lora_B", "lora_magnitude_vector")] = rows + 0.5
    return state


def test_peft_computes_what_doras_formula_says(tmp_path: Path) -> None:
    """(W + scale * B A) * m / its row norms merged by hand."""
    state = dora()
    save_adapter(tmp_path, state, info(use_dora=True), "some/base")
    merged = base()
    with torch.no_grad():
        for name in state:
            if name.endswith("lora_A"):
                weight = merged.get_submodule(name.removesuffix(".lora_A")).weight
                weight += 7.0 / R * state[f"{name[:-1]}B"] @ state[name]
                magnitude = state[name.replace("lora_A", "lora_magnitude_vector")]
                weight *= (magnitude / weight.norm(dim=1))[:, None]
    ids = torch.arange(10).reshape(1, -1)
    with torch.no_grad():
        ours, theirs = merged(ids).logits, loaded_by_peft(tmp_path)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_what_peft_saves_with_dora_loads_here(tmp_path: Path) -> None:
    config = LoraConfig(r=R, lora_alpha=5, target_modules=list(LEAVES), use_dora=True)
    model = get_peft_model(base(), config)
    model.save_pretrained(tmp_path)
    state, settings = load_adapter(tmp_path)
    assert settings.use_dora
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == len(theirs) == 3 * len(LEAVES) * LAYERS
    save_adapter(tmp_path / "again", state, settings, "b")
    assert_same(load_file(tmp_path / "again" / "adapter_model.safetensors"), theirs)


def test_magnitudes_and_their_setting_belong_together(tmp_path: Path) -> None:
    state = dora()
    with pytest.raises(UserError, match=r"lora_magnitude_vector is there without use_dora"):
        save_adapter(tmp_path, state, info(), "b")
    missing = "model.layers.1.mlp.up_proj.lora_magnitude_vector"
    bad = {**state, missing: state[missing][:, None]}
    with pytest.raises(UserError, match=rf"{missing} has shape .* instead of \(out,\)"):
        save_adapter(tmp_path, bad, info(use_dora=True), "b")
    del state[missing]
    with pytest.raises(UserError, match=rf"{missing} is missing"):
        save_adapter(tmp_path, state, info(use_dora=True), "b")


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    state = adapter()
    save_adapter(tmp_path, state, info(lora_dropout=0.25, use_rslora=True), "b")
    again, settings = load_adapter(tmp_path)
    assert_same(state, again)
    assert settings == AdapterInfo(R, 7.0, 0.25, tuple(sorted(LEAVES)), True)


def test_views_of_one_flat_buffer_are_saved_apart(tmp_path: Path) -> None:
    state = adapter()
    flat, views, at = torch.cat([tensor.reshape(-1) for tensor in state.values()]), {}, 0
    for name, tensor in state.items():
        views[name] = flat[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    save_adapter(tmp_path, views, info(), "b")
    assert_same(state, load_adapter(tmp_path)[0])
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * flat.numel() + 8000


def test_what_a_killed_save_left_is_cleared(tmp_path: Path) -> None:
    part = tmp_path / ".adapter_model.safetensors.part"
    part.mkdir(parents=True)
    (part / ".tmp123").write_bytes(b"half")
    save_adapter(tmp_path, adapter(), info(), "b")
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_same(adapter(), load_adapter(tmp_path)[0])


def test_saving_again_replaces_and_files_are_readable_by_the_group(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapter(("q_proj",)), info(("q_proj",)), "b")
    save_adapter(tmp_path, adapter(), info(lora_alpha=9.0), "b")
    assert load_adapter(tmp_path)[1].lora_alpha == 9.0
    assert_same(adapter(), load_adapter(tmp_path)[0])
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "down_proj"], r".*\.(q_proj|up_proj)", ["self_attn.v_proj"]],
    ids=str,
)
def test_loads_what_peft_saved(targets: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    config = LoraConfig(r=R, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_().data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path)
    state, settings = load_adapter(tmp_path)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in theirs.values()} == {dtype}
    expected = {
        key.removeprefix("base_model.model.").removesuffix(".weight"): tensor.float()
        for key, tensor in theirs.items()
    }
    assert_same(expected, state)
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (R, 5, False)
    held = {name.rsplit(".", 2)[1] for name in state}
    assert set(settings.target_modules) == held


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("bias", {"bias": "lora_only"}),
        ("rank_pattern", {"rank_pattern": {"q_proj": 2}}),
        ("alpha_pattern", {"alpha_pattern": {"q_proj": 2}}),
        ("layers_to_transform", {"layers_to_transform": [0]}),
        ("lora_bias", {"lora_bias": True}),
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
        ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
        ("embed_tokens", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("lm_head", {"target_modules": ["lm_head", "q_proj"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_by_name_what_it_lacks(setting: str, changes: Any, tmp_path: Path) -> None:
    config = LoraConfig(
        **{"r": R, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    )
    model = get_peft_model(base(), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=setting):
        load_adapter(tmp_path)


def test_refuses_another_method_a_pickle_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path)
    save_adapter(tmp_path, adapter(), info(), "b")
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_adapter(tmp_path)
    settings = json.loads(config.read_text())
    for bad in ({"peft_type": "IA3"}, {"r": 0}, {"r": "3"}, {"lora_alpha": None}):
        config.write_text(json.dumps({**settings, **bad}))
        with pytest.raises(UserError, match=next(iter(bad))):
            load_adapter(tmp_path)
    config.write_text('{"peft_type": ')
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read"):
        load_adapter(tmp_path)


NAME = "model.layers.1.mlp.up_proj.lora_B"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(0), "is empty"),
        (torch.zeros(MIDDLE, R + 1), "has shape"),
        (torch.zeros(R), "has shape"),
        (torch.full((MIDDLE, R), float("nan")), "not finite"),
        (torch.full((MIDDLE, R), float("inf")), "not finite"),
        (None, "missing"),
    ],
)
def test_refuses_bad_tensors_by_name_both_ways(
    tensor: torch.Tensor | None, reason: str, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    save_adapter(good, adapter(), info(), "b")
    state = adapter()
    keys = load_file(good / "adapter_model.safetensors")
    if tensor is None:
        del state[NAME], keys[f"base_model.model.{NAME}.weight"]
    else:
        state[NAME] = keys[f"base_model.model.{NAME}.weight"] = tensor
    with pytest.raises(UserError, match=rf"up_proj\.lora_[AB].*{reason}"):
        save_adapter(bad, state, info(), "b")
    assert not bad.exists(), "nothing may be left of a refused save"
    save_file(keys, good / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"up_proj\.lora_[AB].*{reason}"):
        load_adapter(good)


def test_refuses_an_empty_adapter_and_uneven_layers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tensors"):
        save_adapter(tmp_path, {}, info(), "b")
    state = adapter()
    for side in "AB":
        del state[f"model.layers.1.mlp.up_proj.lora_{side}"]
    with pytest.raises(UserError, match=r"model\.layers\.1 lacks mlp\.up_proj"):
        save_adapter(tmp_path, state, info(), "b")
    with pytest.raises(UserError, match=r"k_proj is in lora\.target_modules or"):
        save_adapter(tmp_path, adapter(("q_proj",)), info(("q_proj", "k_proj")), "b")
    with pytest.raises(UserError, match=r"lm_head\.lora_A is not"):
        save_adapter(tmp_path, {"lm_head.lora_A": torch.ones(R, 4)}, info(), "b")
