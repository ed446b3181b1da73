"""LoRA's masters, compute copies, start and names against PEFT."""

import math
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.model.lora import GroupMembers, target_indices
from fttrain.quant.frozen_layer import GroupShape
from fttrain.util.errors import UserError

GROUPS = (
    GroupMembers(GroupShape("qkv", 8, (8, 4, 4)), ("a.q_proj", "a.k_proj", "a.v_proj")),
    GroupMembers(GroupShape("o", 8, (8,)), ("a.o_proj",)),
)


def adapters(layer: int = 0, **settings: Any) -> LayerAdapters:
    config = LoraConfig(**{"r": 2, **settings})
    return LayerAdapters(layer, GROUPS, config, tiny.CPU, torch.float32)


def names_below(adapter: LayerAdapters) -> list[str]:
    return [name.split(".", 3)[3] for name, _ in adapter.named_masters()]


def test_scaling() -> None:
    assert LoraConfig(r=16, lora_alpha=32).scaling == 2
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 32 / math.sqrt(16)


def test_names_and_shapes_are_pefts() -> None:
    source = tiny.model("qwen2")
    decoder, _ = tiny.build(source, lora=LoraConfig(r=4))
    config = PeftLoraConfig(r=4, target_modules=list(tiny.LINEARS))
    theirs = {
        name: tuple(parameter.shape)
        for name, parameter in get_peft_model(source, config).named_parameters()
        if "lora_" in name
    }
    assert {tiny.peft_name(n): tuple(m.shape) for n, m in tiny.named_masters(decoder)} == theirs


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("all-linear", {"qkv": [0, 1, 2], "o": [0]}),
        (("q_proj", "v_proj"), {"qkv": [0, 2], "o": []}),
        ("o_proj", {"qkv": [], "o": [0]}),
    ],
)
def test_target_modules(targets: Any, found: dict[str, list[int]]) -> None:
    config = LoraConfig(target_modules=targets)
    assert target_indices(GROUPS, config) == found
    members = sum(len(members) for members in found.values())
    assert len(names_below(adapters(target_modules=targets))) == 2 * members


def test_unknown_target_is_refused_with_the_list() -> None:
    with pytest.raises(UserError, match=r"target_modules: no linear is called w1.*q_proj, k_proj"):
        adapters(target_modules=("q_proj", "w1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, "lora.r=-1"),
        ({"r": 0, "lora_dropout": 0.1}, "lora.lora_dropout=0.1 with lora.r=0: there is no adapter"),
        ({"r": 0, "target_modules": "q_proj"}, "lora.target_modules=.* with lora.r=0"),
        ({"lora_dropout": 1.0}, "lora.lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora.lora_dropout=-0.1"),
        ({"lora_alpha": 0}, "lora.lora_alpha=0"),
        ({"target_modules": ()}, "lora.target_modules is empty"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


def test_start_is_that_of_torchs_linear_and_depends_on_seed_and_layer_only() -> None:
    first = adapters()
    first.reset(7)
    for name, master in first.named_masters():
        if name.endswith("lora_B"):
            assert not master.any()
        else:
            bound = 1 / math.sqrt(master.shape[1])
            assert float(master.abs().max()) <= bound
            assert float(master.std()) == pytest.approx(bound / math.sqrt(3), rel=0.5)
    again, other_seed, other_layer = adapters(), adapters(), adapters(layer=1)
    torch.manual_seed(99)  # the global generator plays no part
    again.reset(7), other_seed.reset(8), other_layer.reset(7)
    assert torch.equal(again.flat, first.flat)
    assert not torch.equal(other_seed.flat, first.flat)
    assert not torch.equal(other_layer.flat, first.flat)
    values = torch.cat([m.reshape(-1) for n, m in first.named_masters() if n.endswith("A")])
    assert len(values.unique()) == len(values)  # no two modules start alike


def test_peft_starts_from_the_same_distribution() -> None:
    source = tiny.model("llama")
    config = PeftLoraConfig(r=32, target_modules=["down_proj"])
    theirs = dict(get_peft_model(source, config).named_parameters())[
        tiny.peft_name("model.layers.0.mlp.down_proj.lora_A")
    ]
    groups = Architecture(source.config).groups
    ours = LayerAdapters(
        0, groups, LoraConfig(r=32, target_modules="down_proj"), tiny.CPU, torch.float32
    )
    ours.reset(0)
    (_, master), _ = ours.named_masters()
    assert float(master.std()) == pytest.approx(float(theirs.detach().std()), rel=0.05)
    assert float(master.abs().max()) == pytest.approx(float(theirs.detach().abs().max()), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_copies_follow_the_masters(dtype: torch.dtype) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=("q_proj", "v_proj"))
    layer = LayerAdapters(0, GROUPS, config, tiny.CPU, dtype)
    layer.flat.data.normal_()
    layer.refresh()
    masters = dict(layer.named_masters())
    qkv = layer.groups["qkv"]
    a, b = (
        torch.cat(
            [masters[f"model.layers.0.a.{name}.lora_{half}"] for name in ("q_proj", "v_proj")]
        )
        for half in ("A", "B")
    )
    assert torch.equal(qkv.a, a.to(dtype))
    assert torch.equal(qkv.b, (b * 3).to(dtype))


def test_each_member_of_a_group_has_its_own_part() -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=("q_proj", "v_proj"))
    layer = LayerAdapters(0, GROUPS, config, tiny.CPU, torch.float32)
    layer.flat.data.normal_()
    layer.refresh()
    layer.bind_gradient(torch.zeros_like(layer.flat))
    qkv = layer.groups["qkv"]
    dense = torch.zeros(16, 4, requires_grad=True)  # 3 * B: q in the first rows, v in the last
    with torch.no_grad():
        dense[0:8, 0:2], dense[12:16, 2:4] = qkv.b[:8], qkv.b[8:]
    down, grad = torch.randn(5, 4, requires_grad=True), torch.randn(5, 16)
    start, product = torch.randn(5, 16), down @ dense.t()
    product.backward(grad)
    assert dense.grad is not None

    y = start.clone()
    qkv.add_to_(y, down.detach())
    qkv.accumulate(torch.ones_like(qkv.a), down.detach(), grad)

    torch.testing.assert_close(y, start + product.detach())
    torch.testing.assert_close(qkv.down_gradient(grad), down.grad)
    wanted = torch.cat([dense.grad[0:8, 0:2], dense.grad[12:16, 2:4]]) * 3
    torch.testing.assert_close(qkv.b_grad, wanted)
    assert torch.equal(qkv.a_grad, torch.ones_like(qkv.a))


def test_masters_and_gradients_are_views_of_one_flat_tensor() -> None:
    layer = adapters()
    parameters = list(layer.parameters())
    assert len(parameters) == 1
    assert parameters[0] is layer.flat
    for number, (_, master) in enumerate(layer.named_masters()):
        master.fill_(number)
    assert layer.flat.unique().tolist() == list(range(8))
    assert sum(m.numel() for _, m in layer.named_masters()) == 112
    layer.bind_gradient(torch.zeros_like(layer.flat))
    for group in layer.groups.values():
        group.accumulate(
            torch.ones_like(group.a),
            torch.ones(3, group.rank),
            torch.ones(3, group.group.shape.shape[0]),
        )
    assert all(bool((grad != 0).all()) for _, grad in layer.named(layer.grad))
    assert int((layer.grad != 0).sum()) == 112  # the padding stays as it was
