"""Causal attention over documents that lie end to end, as an operator of torch.

Two custom operators with fake kernels, so that a run can be planned without running it. Documents
never see each other and no dense (T, T) mask exists anywhere: CUDA runs flash attention's
variable-length kernel, the CPU runs causal flash attention document by document. Document lengths
travel as Python ints, so nothing waits for the device.

Legend: N tokens, H query heads, K key and value heads, D width of a head, L tokens of one document.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fttrain.util.units import round_up

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch's CPU flash backward is 4 times slower in bf16 than in fp32 up to about this many tokens
# (measured)
_CPU_FP32_BACKWARD_TOKENS = 512


@torch.library.custom_op("fttrain::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document: the output (N, H, D), and the log-sum-exp of the
    scores, fp32 (H, N).

    ``q`` (N, H, D), ``k`` and ``v`` (N, K, D); ``lengths``: tokens of each document, N together;
    ``scale``: of q k^T; ``window``: tokens that a token sees, itself included, 0: all.
    """
    if q.is_cuda:
        return _cuda_forward(q, k, v, lengths, scale, window)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for document in _documents(lengths):
        for rows, keys, mask in _tiles(document, window, q.device):
            tile_out, tile_lse = _cpu_flash(
                _heads(q[rows]),
                _heads(k[keys]),
                _heads(v[keys]),
                0.0,
                mask is None,
                attn_mask=_additive(mask, q.dtype),
                scale=scale,
            )
            out[rows] = tile_out[0].transpose(0, 1)
            lse[:, rows] = tile_lse[0]
    return out, lse


@varlen_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("fttrain::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
) -> Tensor:
    """Gradients of q, k and v side by side (N, H + 2K, D), from ``grad`` (N, H, D) of the output.

    The other arguments: those of ``varlen_attention`` and its results.
    """
    if q.is_cuda:
        return torch.cat(_cuda_backward(grad, q, k, v, out, lse, lengths, scale, window), dim=1)
    heads, kv_heads = q.shape[1], k.shape[1]
    grads = q.new_empty(q.shape[0], heads + 2 * kv_heads, q.shape[2])
    grad_q, grad_k, grad_v = grads.split([heads, kv_heads, kv_heads], dim=1)
    if window:
        grad_k.zero_(), grad_v.zero_()
    if max(lengths, default=0) <= _CPU_FP32_BACKWARD_TOKENS:
        grad, q, k, v, out = (tensor.float() for tensor in (grad, q, k, v, out))
    for document in _documents(lengths):
        for rows, keys, mask in _tiles(document, window, q.device):
            tile_q, tile_k, tile_v = _cpu_flash_backward(
                _heads(grad[rows]),
                _heads(q[rows]),
                _heads(k[keys]),
                _heads(v[keys]),
                _heads(out[rows]),
                lse[:, rows].unsqueeze(0),
                0.0,
                mask is None,
                attn_mask=_additive(mask, q.dtype),
                scale=scale,
            )
            grad_q[rows] = tile_q[0].transpose(0, 1)
            for target, value in ((grad_k, tile_k), (grad_v, tile_v)):
                value = _sum_shared_heads(value[0], kv_heads).transpose(0, 1)
                if mask is None:
                    target[keys] = value
                else:
                    target[keys] += value  # neighbouring tiles of a window share keys
    return grads


@varlen_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2])


def _documents(lengths: list[int]) -> list[slice]:
    return [
        slice(end - length, end)
        for end, length in zip(accumulate(lengths), lengths, strict=True)
        if length
    ]


def _tiles(
    document: slice, window: int, device: torch.device
) -> list[tuple[slice, slice, Tensor | None]]:
    """Tiles of a document, each (query rows, key rows, mask): one causal tile without a mask, or
    with a window tiles of its length whose keys reach one tile back.

    A mask is bool, at most (window, 2 * window), so that none has the square of a document.
    """
    length = document.stop - document.start
    if not window or length <= window:
        return [(document, document, None)]
    tiles: list[tuple[slice, slice, Tensor | None]] = []
    for start in range(document.start, document.stop, window):
        rows = slice(start, min(start + window, document.stop))
        keys = slice(max(document.start, start - window + 1), rows.stop)
        distance = (
            torch.arange(rows.start, rows.stop, device=device)[:, None]
            - torch.arange(keys.start, keys.stop, device=device)[None, :]
        )
        tiles.append((rows, keys, (distance >= 0) & (distance < window)))
    return tiles


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask that the CPU kernel adds to scores: 0 where ``mask`` is True, -inf elsewhere."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _heads(tensor: Tensor) -> Tensor:
    """View of ``tensor`` (L, H, D) as (1, H, L, D)."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _sum_shared_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """Sum ``grad`` (K or H, L, D) over the query heads of each key head: (K, L, D)."""
    if grad.shape[0] == kv_heads:
        return grad
    return grad.view(kv_heads, -1, *grad.shape[1:]).sum(1)


def _boundaries(lengths: list[int], device: torch.device) -> tuple[Tensor, int]:
    """The offsets of the documents, int32 (documents + 1,), and the tokens of the longest."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=True)
    return starts.to(device, non_blocking=True), max(lengths, default=0)


def _cuda_window(window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    starts, longest = _boundaries(lengths, q.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
        **_cuda_window(window),
    )
    return out, lse


def _cuda_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    starts, longest = _boundaries(lengths, q.device)
    unused_rng = torch.zeros(2, dtype=torch.uint64, device=q.device)  # only dropout reads it
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        starts,
        starts,
        longest,
        longest,
        0.0,
        True,
        unused_rng,
        unused_rng.new_empty(0),
        scale=scale,
        **_cuda_window(window),
    )


def cuda_backward_bytes(
    tokens: int, documents: int, heads: int, kv_heads: int, width: int, itemsize: int
) -> int:
    """Peak bytes that ``varlen_attention_backward`` allocates on a GPU beside its arguments and its
    result. The forward allocates nothing of that size.

    The sizes are those of ``mha_varlen_bwd`` in torch's ATen/native/transformers/cuda/flash_attn/
    flash_api.cpp. ``torch.use_deterministic_algorithms``, which nothing here sets, could multiply
    ``dq_accum_bytes``.
    """
    rows = tokens + 128 * documents  # one block of padding rows between two documents
    padded = round_up(width, 32 if width <= 128 else 64)
    dq_accum_bytes = rows * heads * padded * 4  # fp32
    softmax_d_bytes = heads * rows * 4  # fp32
    head_bytes = tokens * width * itemsize
    # Each query head has gradients of k and v, which are then summed over shared key heads.
    expanded_bytes = 2 * heads * head_bytes if kv_heads < heads else 0
    # dq, dk and dv live beside all this, and then beside the result that they are copied to.
    grads_bytes = (heads + 2 * kv_heads) * head_bytes
    return max(dq_accum_bytes + softmax_d_bytes + expanded_bytes, grads_bytes)


def kernel_name(device: torch.device) -> str:
    """The attention kernel that runs on ``device``, for the log."""
    if device.type == "cuda":
        return "flash attention, variable length"
    return "flash attention on the CPU, document by document"


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.lengths, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    grads = varlen_attention_backward(grad, q, k, v, out, lse, ctx.lengths, ctx.scale, ctx.window)
    return *grads.split([q.shape[1], k.shape[1], k.shape[1]], dim=1), None, None, None


varlen_attention.register_autograd(_autograd, setup_context=_save_for_backward)


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    lengths: tuple[int, ...] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same operator for a plain transformers model, ``attn_implementation="fttrain_varlen"``:
    (1, N, H, D).

    ``query`` (1, H, N, D), ``key`` and ``value`` (1, K, N, D); ``lengths``: tokens of each
    document, given as a keyword of the model's call; None: the row is one document.
    """
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out, _lse = varlen_attention(q, k, v, list(lengths or (len(q),)), scaling, sliding_window or 0)
    return out.unsqueeze(0), None


NAME = "fttrain_varlen"  # as attn_implementation
AttentionInterface.register(NAME, transformers_attention)
