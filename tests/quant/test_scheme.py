"""4-bit quantisation against bitsandbytes' own functions."""

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from fttrain.quant import scheme
from fttrain.quant.config import BLOCKSIZES, QuantConfig
from fttrain.quant.scheme import QuantisedWeight, dequantise, dequantise_scales, quantise
from fttrain.util.errors import UserError


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("piece_weights", [scheme.PIECE_WEIGHTS, 6144, 1])
def test_equals_bitsandbytes_bit_for_bit(
    piece_weights: int,
    kind: str,
    double_quant: bool,
    blocksize: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheme, "PIECE_WEIGHTS", piece_weights)  # all rows, a few, one by one
    config = QuantConfig(kind, blocksize, double_quant)
    values = weight(5, 3 * blocksize if blocksize > 256 else 1024, dtype)
    packed, state = bnb.quantize_4bit(
        values, blocksize=blocksize, compress_statistics=double_quant, quant_type=kind
    )
    ours = quantise(values, config, "w")
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    scales = ours.absmax
    if double_quant:
        assert ours.nested_absmax is not None
        assert ours.offset is not None
        scales = dequantise_scales(ours.absmax, ours.nested_absmax, ours.offset)
    shape = (values.shape[0], values.shape[1])
    assert torch.equal(
        dequantise(ours.packed, scales, shape, config, dtype), bnb.dequantize_4bit(packed, state)
    )


@pytest.mark.parametrize(("kind", "limit"), [("nf4", 0.10), ("fp4", 0.14)])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_error_of_normal_weights_is_that_of_the_code(
    kind: str, limit: float, blocksize: int
) -> None:
    """A wrong kernel shows as an error of 0.2; larger blocks have larger scales."""
    config = QuantConfig(kind, blocksize, double_quant=True)
    values = weight(64, 1024)
    ours = quantise(values, config, "w")
    assert ours.nested_absmax is not None
    assert ours.offset is not None
    scales = dequantise_scales(ours.absmax, ours.nested_absmax, ours.offset)
    back = dequantise(ours.packed, scales, (64, 1024), config, torch.float32)
    error = float((back - values).norm() / values.norm())
    assert error < limit * (blocksize / 64) ** 0.15


@pytest.mark.parametrize(("columns", "blocksize"), [(96, 64), (576, 256), (640, 256), (576, 128)])
def test_rows_that_are_no_whole_number_of_blocks_are_refused(columns: int, blocksize: int) -> None:
    with pytest.raises(UserError, match=f"layers.0.q.*{columns}.*quant.blocksize={blocksize}"):
        quantise(weight(4, columns), QuantConfig("nf4", blocksize), "layers.0.q")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "int8"}, "quant.kind='int8': one of nf4, fp4, none"),
        ({"blocksize": 48}, "quant.blocksize=48: one of 32, 64"),
        ({"blocksize": 0}, "quant.blocksize=0"),
        ({"dequant": "row"}, "quant.dequant='row': layer or tile"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantConfig(**settings)


def read(made: QuantisedWeight, config: QuantConfig, shape: tuple[int, int]) -> torch.Tensor:
    """What ``made`` stands for, in bf16 on the host."""
    scales = made.absmax
    if made.nested_absmax is not None and made.offset is not None:
        scales = dequantise_scales(scales, made.nested_absmax, made.offset)
    return dequantise(made.packed, scales, shape, config, torch.bfloat16).cpu()


@pytest.mark.cuda
@pytest.mark.parametrize("blocksize", [32, 64, 1024])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_card_reads_and_writes_codes_as_the_host_does(
    kind: str, double_quant: bool, blocksize: int
) -> None:
    config, values, shape = QuantConfig(kind, blocksize, double_quant), weight(70, 1024), (70, 1024)
    ours = quantise(values, config, "w")
    on_host = read(ours, config, shape)
    parts = {name: getattr(ours, name) for name in ours.__dataclass_fields__}
    moved = {name: None if part is None else part.cuda() for name, part in parts.items()}
    on_card = read(QuantisedWeight(**moved), config, shape)
    torch.testing.assert_close(on_card, on_host, rtol=2**-7, atol=1e-6)
    by_card = read(quantise(values.cuda(), config, "w"), config, shape)
    # A value between two codes may become the other one: then it is as far off.
    lost, expected = (
        float((read_ - values).norm()) for read_ in (by_card.float(), on_host.float())
    )
    assert lost == pytest.approx(expected, rel=1e-2)
