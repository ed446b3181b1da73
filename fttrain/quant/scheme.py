"""4-bit quantisation of one weight, over bitsandbytes' kernels.

A weight (out, in) becomes ``packed``, two 4-bit codes a byte, with one scale (``absmax``) for each
``blocksize`` consecutive values. Double quantisation stores these scales as 8-bit codes:
fp32 = nested_absmax of 256 codes * code + offset (QLoRA, Dettmers et al. 2023, section 3).
"""

from dataclasses import dataclass

# The import also registers the kernels that are called through ``torch.ops``.
import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from fttrain.quant.config import QuantConfig
from fttrain.util.errors import UserError

# Weights quantised at once: bitsandbytes' CPU kernel takes 12 to 16 bytes of memory for each.
PIECE_WEIGHTS = 1 << 20
NESTED_BLOCKSIZE = 256  # absmax codes that share one nested_absmax; fixed by bitsandbytes


@dataclass(frozen=True)
class QuantisedWeight:
    """One quantised weight (out, in)."""

    packed: Tensor  # uint8 (out * in / 2,)
    absmax: Tensor  # (out * in / blocksize,): uint8 codes with double quantisation, fp32 without
    nested_absmax: Tensor | None  # fp32 (ceil(len(absmax) / 256),)
    offset: Tensor | None  # fp32 (1,): mean of the scales, subtracted before their quantisation


def quantise(weight: Tensor, config: QuantConfig, name: str) -> QuantisedWeight:
    """The 4-bit form of ``weight`` (out, in) in fp32, bf16 or fp16; ``name`` is for errors.

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
        packed_piece, state = bnb.quantize_4bit(
            piece.contiguous(), blocksize=config.blocksize, quant_type=config.kind
        )
        codes.copy_(packed_piece.view(-1))
        scales.copy_(state.absmax)
    if not config.double_quant:
        return QuantisedWeight(packed, absmax, None, None)
    offset = absmax.mean()
    codes, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return QuantisedWeight(packed, codes, nested.absmax, offset.reshape(1))


def dequantise_scales(absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """The scales fp32 (n,) of 8-bit codes ``absmax`` uint8 (n,)."""
    scales = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, nested_absmax, dynamic_code(absmax.device), NESTED_BLOCKSIZE, torch.float32
    )
    return scales.add_(offset)


def dequantise(
    packed: Tensor, scales: Tensor, shape: tuple[int, int], config: QuantConfig, dtype: torch.dtype
) -> Tensor:
    """The weight ``shape`` (out, in) in ``dtype``.

    ``packed``: codes uint8 (out * in / 2,); ``scales``: fp32 (out * in / blocksize,).
    """
    return torch.ops.bitsandbytes.dequantize_4bit(
        packed, scales, config.blocksize, config.kind, shape, dtype
    )


_codes: dict[torch.device, Tensor] = {}


def dynamic_code(device: torch.device) -> Tensor:
    """The values of the 256 codes of an 8-bit scale, fp32 (256,)."""
    if device not in _codes:
        _codes[device] = bnb.create_dynamic_map().to(device)
    return _codes[device]
