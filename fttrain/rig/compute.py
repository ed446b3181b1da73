"""Rates of a device: GEMMs at a model's shapes, dequantisation, memory; and the rate of the
adapters' update on the host.

Legend: N tokens of a micro-batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer
from fttrain.rig.timing import median_s
from fttrain.util.units import MIB

COPY_BYTES = {"cuda": 512 * MIB, "cpu": 128 * MIB}  # far above any cache

ADAMW_VALUES = 1 << 23  # 128 MiB with both moments and the gradient: above any cache, too


def gemm_flop_per_s(
    shapes: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device
) -> float:
    """FLOP/s of a layer's GEMMs, forward and gradients of the inputs.

    ``shapes``: (out, in) of each frozen weight. A GEMM is 2 * N * out * in FLOP, and frozen weights
    have no gradient of their own.
    """
    seconds, flop = 0.0, 0
    for out, width in shapes:
        weight = torch.randn(out, width, device=device).to(dtype)
        hidden = torch.randn(tokens, width, device=device).to(dtype)
        grad = torch.randn(tokens, out, device=device).to(dtype)

        def both(weight: Tensor = weight, hidden: Tensor = hidden, grad: Tensor = grad) -> None:
            F.linear(hidden, weight)
            grad @ weight

        seconds += median_s(both, device)
        flop += 2 * 2 * tokens * out * width
    return flop / seconds


def dequantise_bytes_per_s(frozen_format: FrozenFormat, device: torch.device) -> float | None:
    """Bytes/s of weights in the model's dtype, dequantised from 4 bits over a whole layer, scales
    included. None for a base that is not quantised.
    """
    if not frozen_format.quant.is_quantised:
        return None
    # Zero scales: the time does not depend on the values, and random bits would be NaNs.
    flat = torch.zeros(frozen_format.layout.size_bytes, dtype=torch.uint8, device=device)
    values = sum(rows * columns for rows, columns in _shapes(frozen_format))

    def layer() -> None:
        frozen = FrozenLayer(flat, frozen_format)  # a new one: nothing is dequantised yet
        for group in frozen_format.groups:
            frozen.weight(group)

    return values * frozen_format.dtype.itemsize / median_s(layer, device)


def memory_bytes_per_s(device: torch.device) -> float:
    """Bytes/s read and written by a large copy on the device; on a CPU, by this rank's threads."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_s(lambda: target.copy_(source), device)


def adamw_values_per_s() -> float:
    """fp32 values/s that this rank's CPU threads update, as with ``optim.offload``."""
    values = torch.nn.Parameter(torch.ones(ADAMW_VALUES))
    values.grad = torch.full_like(values, 1e-3)
    optimizer = torch.optim.AdamW([values], fused=True)
    return ADAMW_VALUES / median_s(optimizer.step, torch.device("cpu"))


def _shapes(frozen_format: FrozenFormat) -> list[tuple[int, int]]:
    return [group.shape for group in frozen_format.groups.values()]
