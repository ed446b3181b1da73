"""The base of random bytes: its layers can be told apart, and their checksums are true."""

import itertools

import pytest
import torch
from torch import Tensor

from fttrain.plan.random_base import RandomBase
from fttrain.quant.checksum import checksum
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer, GroupShape

LAYERS = 255
FORMAT = FrozenFormat(
    [GroupShape("qkv", 64, (64, 32)), GroupShape("o", 64, (64,))],
    {"norm": (64,)},
    QuantConfig(),
    torch.bfloat16,
)


@pytest.fixture
def base() -> RandomBase:
    return RandomBase(LAYERS, FORMAT)


def read(base: RandomBase, layer: int) -> Tensor:
    flat = torch.empty(FORMAT.layout.size_bytes, dtype=torch.uint8)
    base.read(layer, flat)
    return flat


def test_a_layers_checksum_is_its_own(base: RandomBase) -> None:
    flats = [read(base, layer) for layer in range(LAYERS)]
    assert [base.checksum(layer) for layer in range(LAYERS)] == [int(checksum(f)) for f in flats]
    assert len({base.checksum(layer) for layer in range(LAYERS)}) == LAYERS


def test_layers_differ_in_every_packed_byte_and_nowhere_else(base: RandomBase) -> None:
    one, other = (FORMAT.layout.views(read(base, layer)) for layer in (0, 254))
    for name in one:
        if name.endswith(".packed"):
            assert bool((one[name] != other[name]).all())
        else:
            assert torch.equal(one[name], other[name])
    weight = FrozenLayer(read(base, 254), FORMAT).weight("qkv").float()
    assert 0.001 < float(weight.std()) < 0.1
    assert float(weight.abs().max()) < 0.2


@pytest.mark.parametrize("parts", [2, 11])
def test_a_layer_read_in_parts_is_the_layer(base: RandomBase, parts: int) -> None:
    size_bytes = FORMAT.layout.size_bytes
    cuts = [size_bytes * part // parts // 8 * 8 for part in range(parts)] + [size_bytes]
    found = torch.empty(size_bytes, dtype=torch.uint8)
    for begin, end in itertools.pairwise(cuts):
        base.read(130, found[begin:end], begin)
    assert torch.equal(found, read(base, 130))


def test_an_end_does_not_depend_on_what_was_read_before(base: RandomBase) -> None:
    head, again = torch.empty(2, 32, 64).unbind(0)
    base.read_end("head", head)
    base.read_end("embedding", again)
    assert not torch.equal(head, again)
    base.read_end("head", again)
    assert torch.equal(head, again)
