"""Groups of linears one after the other, in tiles of tokens: one node of autograd.

    x (N, in) ── tile by tile: group ── between (T, width) ── group ──> y (N, out)

``between`` is the output of an MLP's gate_up, wider than the hidden width. It is saved whole,
(N, width), where the layer keeps all activations; else it exists for one tile at a time, in forward
and backward, and ``x`` alone is saved. Without tiles there is one tile of N tokens.

Backward follows a recomputation at once, so a recomputation skips what backward does not read: it
computes nothing where the last output is ``unread``, for backward computes each tile's ``between``.

Legend: N tokens, T tokens of a tile, in and out summed over a group, R adapter ranks summed over a
group. Tensors are in the compute dtype.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fttrain.model.linears import DropoutKey, LinearGroup


def apply_linears(x: Tensor, *groups: LinearGroup, tile_tokens: int = 0) -> Tensor:
    """Return the output (N, out) of ``groups``, applied to ``x`` (N, in) one after the other.

    ``tile_tokens``: tokens of a tile, a multiple of ``MASK_TOKENS``; 0: all.
    """
    return _ApplyLinears.apply(x, groups, tile_tokens)


class _ApplyLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Sequence[LinearGroup], tile_tokens: int) -> Tensor:
        state, width = groups[0].state, groups[-1].shape.shape[0]
        ctx.groups, ctx.dropout, ctx.tile_tokens = groups, state.dropout, tile_tokens
        ctx.downs = []  # by tile, each group's A x̂ (T, R); only of a recomputation
        if state.recomputing and groups[-1].unread:
            ctx.save_for_backward(x)
            return x.new_zeros(()).expand(len(x), width)  # (N, out), without memory
        between = []  # (N, width) of each group but the last
        if ctx.needs_input_grad[0]:
            between = [x.new_empty(len(x), group.shape.shape[0]) for group in groups[:-1]]
        y = x.new_empty(len(x), width)  # (N, out)
        for rows in _tiles(len(x), tile_tokens):
            outs = [whole[rows] for whole in (*between, y)]
            downs = _forward(groups, x[rows], outs, _tile_key(ctx.dropout, rows))[1]
            if state.recomputing:
                ctx.downs.append(downs)
        ctx.save_for_backward(x, *between, *([y] if groups[-1].reads_output else []))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, *outputs = ctx.saved_tensors
        grad_x = x.new_empty(x.shape)  # (N, in)
        for number, rows in enumerate(_tiles(len(x), ctx.tile_tokens)):
            values = [saved[rows] for saved in (x, *outputs)]
            downs = ctx.downs[number] if ctx.downs else [None] * len(ctx.groups)
            key = _tile_key(ctx.dropout, rows)
            _backward(ctx.groups, values, downs, grad[rows], grad_x[rows], key)
        ctx.downs = []
        return grad_x, None, None


def _tiles(tokens: int, tile_tokens: int) -> Iterator[slice]:
    step = tile_tokens or max(tokens, 1)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _tile_key(dropout: DropoutKey | None, rows: slice) -> DropoutKey | None:
    return None if dropout is None else dropout.at(rows.start)


def _forward(
    groups: Sequence[LinearGroup], x: Tensor, outs: Sequence[Tensor], dropout: DropoutKey | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Forward of one tile. Return each group's output (T, out), the last ones in ``outs``, and its
    A x̂ (T, R).
    """
    outputs: list[Tensor] = []
    downs: list[Tensor | None] = []
    for group, out in zip(groups, [None] * (len(groups) - len(outs)) + [*outs], strict=True):
        inputs, down = group.enter(outputs[-1] if outputs else x, dropout)
        outputs.append(group.output(inputs, down, out))
        downs.append(down)
    return outputs, downs


def _backward(
    groups: Sequence[LinearGroup],
    values: list[Tensor],
    downs: list[Tensor | None],
    grad: Tensor,
    out: Tensor,
    dropout: DropoutKey | None,
) -> None:
    """Backward of one tile. ``out`` (T, in) becomes the gradient of the first group's input, from
    ``grad`` (T, out) of the last group's output.

    ``values``: the input of each group and, where backward reads it, the output of the last; or the
    first group's input alone. ``downs``: A x̂ (T, R) of each group, None: compute it again. Both
    lists are emptied, so that each tensor is freed once it was read.
    """
    reads_last = groups[-1].reads_output
    if len(values) < len(groups) + reads_last:
        recomputed = groups if reads_last else groups[:-1]
        outputs, new_downs = _forward(recomputed, values[0], [], dropout)
        values.extend(outputs)
        downs[: len(new_downs)] = new_downs
        del outputs, new_downs
    y = values.pop() if reads_last else None
    for group, before in zip(groups[:0:-1], groups[-2::-1], strict=True):
        x = values.pop()
        grad = group.backward(grad, x, downs.pop(), dropout, y=y)
        y = x if before.reads_output else None
        del x
    groups[0].backward(grad, values.pop(), downs.pop(), dropout, out, y)
