"""Checks of a run's kernels: quantiser, attention, Liger's; each is called and compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fttrain.doctor.finding import Finding, failure, ok, warning
from fttrain.model import functions, liger
from fttrain.model.attention_op import kernel_name, varlen_attention
from fttrain.quant.config import QuantConfig
from fttrain.quant.scheme import dequantise, quantise
from fttrain.util.errors import first_line

# The 16 values of NF4 (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCKSIZE, ROWS, COLUMNS = 64, 128, 256
ATTENTION_TOLERANCE = 0.02  # bf16 against fp32, of values about 1
KERNEL_TOLERANCE = 0.02  # likewise, both in bf16
LENGTHS, HEADS, KV_HEADS, WIDTH = (37, 1, 90), 4, 2, 64


def quantiser(device: torch.device) -> Finding:
    """bitsandbytes' NF4 kernels on ``device``: values that are codes times a power of two must come
    back exactly, and their codes are known.
    """
    weight, packed = _known_weight()
    try:
        config = QuantConfig(blocksize=BLOCKSIZE, double_quant=False)
        quantised = quantise(weight.to(device), config, "doctor's weight")
        restored = dequantise(
            quantised.packed, quantised.absmax, (ROWS, COLUMNS), config, torch.bfloat16
        )
    except Exception as error:  # a library built for another machine may raise anything
        return failure(f"bitsandbytes does not run on {device}: {first_line(error)}", REINSTALL)
    codes = int((quantised.packed.cpu() != packed).sum())
    expected = weight.bfloat16().float()
    wrong = int(((restored.cpu().float() - expected).abs() > expected.abs() / 128).sum())
    if codes or wrong:
        return failure(
            f"NF4 on {device}: {wrong} of {weight.numel()} values and {codes} of {packed.numel()} "
            "bytes of codes are not what they have to be",
            REINSTALL,
        )
    return ok(f"NF4 on {device}: {weight.numel():,} values there and back, as they have to be")


REINSTALL = (
    "pip install --force-reinstall --no-deps bitsandbytes "
    "(python -m bitsandbytes says what it finds); quant=none does without"
)


def _known_weight() -> tuple[Tensor, Tensor]:
    """(weight, codes): fp32 (ROWS, COLUMNS) with the largest code in each block; uint8
    (ROWS * COLUMNS / 2,), the first of two codes in the high half.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (ROWS * COLUMNS // BLOCKSIZE, BLOCKSIZE), generator=generator)
    codes[:, 0] = 15
    scales = 2.0 ** torch.randint(-8, 8, (len(codes), 1), generator=generator)
    weight = torch.tensor(NF4)[codes] * scales
    pairs = codes.view(-1, 2)
    return weight.view(ROWS, COLUMNS), (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)


def attention(device: torch.device) -> Finding:
    """The kernel of a run, forward and backward on three documents, against a plain softmax in
    fp32.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *qkv, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    try:
        inputs = [tensor.to(device).requires_grad_() for tensor in qkv]
        out, _ = varlen_attention(*inputs, list(LENGTHS), WIDTH**-0.5, 0)
        results = [out, *torch.autograd.grad(out, inputs, grad.to(device))]
    except Exception as error:  # as above
        return failure(
            f"{kernel_name(device)}: it does not run: {first_line(error)}",
            "a card of compute capability 8.0 (RTX 30) or newer, or rig.device=cpu",
        )
    plain = [tensor.float().requires_grad_() for tensor in qkv]
    reference = _softmax_attention(*plain)
    expected = [reference, *torch.autograd.grad(reference, plain, grad.float())]
    worst = max(_error(*pair) for pair in zip(results, expected, strict=True))
    if not worst < ATTENTION_TOLERANCE:  # NaN fails as well
        return failure(
            f"{kernel_name(device)}: it is off by {worst:.3f} of the largest value",
            "another version of torch (fttrain's bounds: pip install 'torch>=2.11,<2.14')",
        )
    return ok(f"{kernel_name(device)}, forward and backward, off by {worst:.4f} in bf16")


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fp32 (N, H, D), (N, K, D), (N, K, D) -> (N, H, D): each document by itself, causal."""
    parts = []
    for document_q, document_k, document_v in zip(
        *(t.split(LENGTHS) for t in (q, k, v)), strict=True
    ):
        wide_k, wide_v = (
            t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (document_k, document_v)
        )
        scores = torch.einsum("qhd,khd->hqk", document_q, wide_k) * WIDTH**-0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, wide_v))
    return torch.cat(parts)


def norm_rotary_swiglu(device: torch.device) -> Finding:
    """Liger's kernels on ``device``, forward and backward, against plain torch, both in bf16."""
    if missing := liger.missing_on(device):
        return warning(f"{missing}: runs take torch's kernels", "pip install 'fttrain[liger]'")
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, heads, WIDTH) for heads in (HEADS, 2 * HEADS)]
    x, gate_up = (torch.randn(s, generator=generator).bfloat16().to(device) for s in shapes)
    weight, angles, gate_up = x[0, 0], x[:, 0], gate_up.flatten(1)
    compute: dict[str, Callable[[Any], Tensor]] = {
        "norm": lambda by: by.rms_norm(x, weight, 1e-5),
        "norm's gradient": lambda by: by.rms_norm_backward(x.sin(), x, weight, 1e-5),
        "SwiGLU": lambda by: by.swiglu(gate_up),
        "SwiGLU's gradient": lambda by: by.swiglu_backward(x.flatten(1), gate_up),
        "rotary embedding": lambda by: by.rotate_(x.clone(), angles.cos(), angles.sin()),
    }
    with torch.cuda.device_of(x):  # the device of Triton's launches
        results = {name: (call(liger), call(functions)) for name, call in compute.items()}
    apart = {
        name: _error(liger_result, plain.cpu().float())
        for name, (liger_result, plain) in results.items()
    }
    wrong = {name: error for name, error in apart.items() if not error < KERNEL_TOLERANCE}
    if wrong:
        return failure(
            "; ".join(f"{name} is off by {error:.3f}" for name, error in wrong.items())
            + " of the largest value",
            "kernels=torch, or pip install --force-reinstall 'fttrain[liger]'",
        )
    return ok(f"Liger's, off by {max(apart.values()):.4f} of torch's in bf16")


def _error(result: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    difference = result.detach().cpu().float() - expected.detach()
    return float(difference.abs().max() / expected.detach().abs().max())
