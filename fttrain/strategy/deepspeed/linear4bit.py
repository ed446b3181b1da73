"""bitsandbytes' 4-bit linear over the bytes of a frozen layer."""

from typing import Any

import torch
from torch import Tensor

from fttrain.quant.frozen_layer import FrozenLayer, GroupShape
from fttrain.quant.scheme import NESTED_BLOCKSIZE, dynamic_code
from fttrain.strategy.context import BuildContext


def linear4bit(frozen: FrozenLayer, group: GroupShape, member: int, context: BuildContext) -> Any:
    """The linear ``member`` of ``group`` as a bitsandbytes module, without its bias. Codes and
    scales are those of ``frozen``: nothing is quantised again.
    """
    # Late: the import takes seconds.
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    quant, rows = context.spec.quant, group.rows[member]
    half = group.in_features // 2
    codes = frozen.tensor(f"{group.name}.packed")[rows.start * half : rows.stop * half]
    with torch.device("meta"):
        linear = Linear4bit(
            group.in_features, rows.stop - rows.start, bias=False, compute_dtype=context.dtype
        )
    state = _state(frozen, group, member, context)
    linear.weight = Params4bit(
        codes.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=quant.blocksize,
        compress_statistics=quant.double_quant,
        quant_type=quant.kind,
        module=linear,
        bnb_quantized=True,
    )
    linear.quant_state = state
    # With it, a CPU with AVX512-BF16 repacks the codes in place at the first forward without
    # gradients, and backward reads the repacked codes in the old order.
    linear.support_avx512bf16_for_cpu = False
    return linear


def _state(frozen: FrozenLayer, group: GroupShape, member: int, context: BuildContext) -> Any:
    from bitsandbytes.functional import QuantState, get_4bit_type

    quant, rows = context.spec.quant, group.rows[member]
    scales = context.frozen_format.scales[group.name][member]
    absmax: Tensor = frozen.tensor(f"{group.name}.absmax")[scales.codes]
    settings: dict[str, Any] = {
        "shape": torch.Size((rows.stop - rows.start, group.in_features)),
        "code": get_4bit_type(quant.kind, device=absmax.device),
        "blocksize": quant.blocksize,
        "quant_type": quant.kind,
        "dtype": context.dtype,
    }
    if quant.double_quant:
        settings["offset"] = frozen.tensor(f"{group.name}.offset")[member]
        settings["state2"] = QuantState(
            absmax=frozen.tensor(f"{group.name}.nested_absmax")[scales.nested],
            code=dynamic_code(absmax.device),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    return QuantState(absmax=absmax, **settings)
