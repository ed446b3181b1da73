"""The projection's two GEMMs in every form, against the table that it stands for."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from fttrain.model import projection
from fttrain.model.projection import (
    QuantizedHead,
    ResidentHead,
    StreamedHead,
    tile_bytes,
    tiled_format,
)
from fttrain.quant.config import QuantConfig
from fttrain.util.units import MIB

CPU = torch.device("cpu")
VOCABULARY, WIDTH, TOKENS = 300, 128, 7


def table(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)


def logits_of(form: ResidentHead | QuantizedHead, hidden: Tensor) -> Tensor:
    out = hidden.new_full((len(hidden), VOCABULARY), torch.nan)
    with form.on_device():
        form.project(hidden, out)
    return out


@pytest.mark.parametrize("tile_rows", [64, 128, 320])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"]
)
def test_tiles_equal_the_whole_table(
    dtype: torch.dtype, limit: float, kind: str, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without double quantisation no scale knows of its tile: bitsandbytes has the table whole."""
    monkeypatch.setattr(projection, "TILE_BYTES", tile_rows * WIDTH * dtype.itemsize)
    tiles = tiled_format(VOCABULARY, WIDTH, QuantConfig(kind, 128, False), dtype)
    assert len(tiles.groups) == -(-VOCABULARY // tile_rows)
    ours, hidden = QuantizedHead(table(dtype), tiles, CPU), torch.randn(TOKENS, WIDTH).to(dtype)
    packed = bnb.quantize_4bit(table(dtype), blocksize=128, quant_type=kind)
    whole = bnb.dequantize_4bit(*packed).double()
    grad = torch.randn(TOKENS, VOCABULARY).to(dtype)
    for found, expected in (
        (logits_of(ours, hidden), hidden.double() @ whole.t()),
        (ours.project_back(grad), grad.double() @ whole),
    ):
        assert found.dtype == dtype
        assert float((found - expected).norm() / expected.norm()) < limit


def test_a_streamed_table_is_on_the_device_while_it_is_used_and_counted() -> None:
    weight, hidden = table(), torch.randn(TOKENS, WIDTH)
    streamed = StreamedHead(weight, CPU)
    assert torch.equal(logits_of(streamed, hidden), logits_of(ResidentHead(weight), hidden))
    with streamed.on_device():
        assert streamed.weight is not weight
        assert torch.equal(streamed.weight, weight)
    assert streamed.weight is weight
    assert streamed.take_traffic().h2d_bytes == 2 * weight.nbytes
    assert streamed.take_traffic().h2d_bytes == 0


def test_a_70b_head_takes_half_a_gib_and_little_while_it_is_used() -> None:
    vocabulary, hidden = 128256, 8192
    tiles = tiled_format(vocabulary, hidden, QuantConfig(), torch.bfloat16)
    # 4 bits, 8 for 64 weights, 32 for 64 x 256 of them (QLoRA, section 3)
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    expected = vocabulary * hidden * bits / 8
    assert tiles.layout.size_bytes == pytest.approx(expected, rel=1e-3)
    assert tile_bytes(tiles, 512) < 64 * MIB
    rows = [shape.shape[0] for shape in tiles.groups.values()]
    assert rows == [2048] * 62 + [1280]
