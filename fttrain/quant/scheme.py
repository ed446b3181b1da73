"""4-bit quantisation of one weight, over bitsandbytes' kernels.

A weight (out, in) becomes ``packed``, two 4-bit codes a byte, with one scale (``absmax``) for each
``blocksize`` consecutive values. Double quantisation stores those scales as 8-bit codes themselves:
fp32 = nested_absmax of 256 codes * code + offset (QLoRA, Dettmers et al. 2023, section 3).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fttrain.errors import UserError

KINDS = ("nf4", "fp4", "none")
# From 2048 on bitsandbytes' CPU kernel falls back to a slow path.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024)
# At once: bitsandbytes' CPU kernel takes 12 to 16 bytes of memory a weight while it quantises.
PIECE_WEIGHTS = 1 << 20
NESTED_BLOCKSIZE = 256  # absmax codes that share one nested_absmax; fixed by bitsandbytes


@dataclass(frozen=True)
class QuantConfig:
    """How the frozen base is stored."""

    kind: str = "nf4"  # nf4 | fp4 | none (the base stays in model.dtype)
    blocksize: int = 64  # weights that share one scale
    double_quant: bool = True  # scales quantised to 8 bits too: 4.14, not 4.5 bits a weight
    # layer: a layer is dequantised once for all micro-batches of a group | tile: linear by linear
    dequant: str = "layer"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"quant.kind={self.kind!r}: one of {', '.join(KINDS)} is allowed")
        if self.blocksize not in BLOCKSIZES:
            raise UserError(
                f"quant.blocksize={self.blocksize}: one of {', '.join(map(str, BLOCKSIZES))} is "
                "allowed"
            )
        if self.dequant not in ("layer", "tile"):
            raise UserError(f"quant.dequant={self.dequant!r}: layer or tile is allowed")

    @property
    def is_quantised(self) -> bool:
        return self.kind != "none"


@dataclass(frozen=True)
class QuantisedWeight:
    """One quantised weight (out, in)."""

    packed: Tensor  # uint8 (out * in / 2,)
    absmax: Tensor  # (out * in / blocksize,): uint8 codes with double quantisation, fp32 without
    nested_absmax: Tensor | None  # fp32 (ceil(len(absmax) / 256),)
    offset: Tensor | None  # fp32 (1,): the mean of the scales, taken off before they were quantised


def quantise(weight: Tensor, config: QuantConfig, name: str) -> QuantisedWeight:
    """``weight`` (out, in) in fp32, bf16 or fp16 -> its 4-bit form.

    Raises UserError where a row is not a whole number of blocks: bitsandbytes' CPU kernel
    dequantises such shapes wrongly.
    """
    if weight.shape[-1] % config.blocksize:
        raise UserError(
            f"{name}: rows of {weight.shape[-1]} values are not a multiple of "
            f"quant.blocksize={config.blocksize}; "
            "a smaller block size or quant=none helps"
        )
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(weight.numel() // config.blocksize, device=weight.device)
    rows = max(1, PIECE_WEIGHTS // weight.shape[-1])
    for piece, codes, scales in zip(
        weight.split(rows),
        packed.split(rows * weight.shape[-1] // 2),
        absmax.split(rows * weight.shape[-1] // config.blocksize),
        strict=True,
    ):
        done, state = _bnb().quantize_4bit(
            piece.contiguous(), blocksize=config.blocksize, quant_type=config.kind
        )
        codes.copy_(done.view(-1))
        scales.copy_(state.absmax)
    if not config.double_quant:
        return QuantisedWeight(packed, absmax, None, None)
    offset = absmax.mean()
    codes, nested = _bnb().quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return QuantisedWeight(packed, codes, nested.absmax, offset.reshape(1))


def dequantise_scales(absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """8-bit scale codes uint8 (n,) -> scales fp32 (n,)."""
    _bnb()
    scales = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, nested_absmax, dynamic_code(absmax.device), NESTED_BLOCKSIZE, torch.float32
    )
    return scales.add_(offset)


def dequantise(
    packed: Tensor, scales: Tensor, shape: tuple[int, int], config: QuantConfig, dtype: torch.dtype
) -> Tensor:
    """Codes uint8 (out * in / 2,), scales fp32 (out * in / blocksize,) -> weight (out, in)."""
    _bnb()
    return torch.ops.bitsandbytes.dequantize_4bit(
        packed, scales, config.blocksize, config.kind, shape, dtype
    )


def _bnb() -> Any:
    """bitsandbytes, whose import also registers the kernels that ``torch.ops`` is asked for.

    It takes two seconds, and whoever only reads settings needs none of it.
    """
    import bitsandbytes.functional

    return bitsandbytes.functional


_codes: dict[torch.device, Tensor] = {}


def dynamic_code(device: torch.device) -> Tensor:
    """The 256 values an 8-bit scale code stands for, fp32 (256,)."""
    if device not in _codes:
        _codes[device] = _bnb().create_dynamic_map().to(device)
    return _codes[device]
