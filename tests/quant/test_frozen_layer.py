"""Groups of linears in one flat buffer against each linear on its own."""

import bitsandbytes.functional as bnb
import pytest
import torch

from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer, GroupShape
from fttrain.quant.scheme import quantise

# K and V are 3 rows: their scales (3 blocks and fewer than 256) end in the middle of a nested block
GROUPS = (GroupShape("qkv", 128, (20, 3, 3), bias=True), GroupShape("down", 64, (9,)))
PLAIN = {"norm.weight": (128,)}


def weights() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        group.name: [
            torch.randn(out, group.in_features, generator=generator) for out in group.out_features
        ]
        for group in GROUPS
    }


def filled(quant: QuantConfig, dtype: torch.dtype) -> tuple[torch.Tensor, FrozenFormat]:
    frozen_format = FrozenFormat(GROUPS, PLAIN, quant, dtype)
    flat = torch.zeros(frozen_format.layout.size_bytes, dtype=torch.uint8)
    views = frozen_format.layout.views(flat)
    for name, members in weights().items():
        for member, weight in enumerate(members):
            if quant.is_quantised:
                quantised = quantise(weight.to(dtype), quant, name)
                frozen_format.write_quantised(views, name, member, quantised)
            else:
                views[f"{name}.weight"][frozen_format.groups[name].rows[member]] = weight.to(dtype)
    views["qkv.bias"].copy_(torch.arange(26.0))
    views["norm.weight"].copy_(torch.arange(128.0))
    return flat, frozen_format


@pytest.mark.parametrize("dequant", ["layer", "tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_group_equals_its_members_bit_for_bit(
    kind: str, double_quant: bool, dtype: torch.dtype, dequant: str
) -> None:
    flat, frozen_format = filled(QuantConfig(kind, 64, double_quant, dequant), dtype)
    layer = FrozenLayer(flat, frozen_format)
    for name, members in weights().items():
        expected = []
        for weight in members:
            packed, state = bnb.quantize_4bit(
                weight.to(dtype), blocksize=64, compress_statistics=double_quant, quant_type=kind
            )
            expected.append(bnb.dequantize_4bit(packed, state))
        assert torch.equal(layer.weight(name), torch.cat(expected))
        assert torch.equal(layer.weight(name), torch.cat(expected))  # a second use is the same


def test_unquantised_weights_are_views_of_the_buffer() -> None:
    flat, frozen_format = filled(QuantConfig("none", double_quant=False), torch.bfloat16)
    layer = FrozenLayer(flat, frozen_format)
    for name, members in weights().items():
        assert torch.equal(layer.weight(name), torch.cat(members).bfloat16())
    start, end = flat.data_ptr(), flat.data_ptr() + flat.numel()
    assert start <= layer.weight("qkv").data_ptr() < end


def test_biases_and_norms_stay_as_they_are() -> None:
    layer = FrozenLayer(*filled(QuantConfig(), torch.bfloat16))
    bias = layer.bias("qkv")
    assert bias is not None
    assert torch.equal(bias, torch.arange(26.0).bfloat16())
    assert layer.bias("down") is None
    assert torch.equal(layer.tensor("norm.weight"), torch.arange(128.0).bfloat16())


def test_dequantised_weights_live_as_long_as_the_layer_or_not_at_all() -> None:
    for dequant, same in (("layer", True), ("tile", False)):
        layer = FrozenLayer(*filled(QuantConfig(dequant=dequant), torch.bfloat16))
        first, second = layer.weight("qkv"), layer.weight("qkv")
        assert (first.data_ptr() == second.data_ptr()) is same


def test_bytes_a_weight() -> None:
    """4.5 bits without, 4.14 with double quantisation, at block size 64 (QLoRA, section 3)."""
    shape = GroupShape("w", 4096, (4096,))
    for double_quant, bits in ((False, 4.5), (True, 4.127)):
        quant = QuantConfig(double_quant=double_quant)
        size_bytes = FrozenFormat([shape], {}, quant, torch.bfloat16).layout.size_bytes
        assert size_bytes * 8 / 4096**2 == pytest.approx(bits, abs=0.12)
