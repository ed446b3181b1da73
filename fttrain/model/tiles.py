"""Groups of linears one after the other, in tiles of tokens: one node of autograd.

    x (N, in) ── tile by tile: group ── between (T, width) ── group ──> y (N, out)

What is wider than the model's hidden width lies between the groups of an MLP: gate and up. It is
saved whole, (N, width), where the layer keeps all that its backward reads; else it exists for one
tile at a time, forward and backward, and ``x`` alone is saved. Without tiles there is one, as long
as ``x``.

Backward follows a recomputation at once, and what backward does not read is not computed in it:
nothing at all where the last output is ``unread``, since backward makes each tile's ``between``
itself.

Legend: N tokens, T tokens of a tile, R adapter ranks summed over a group.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fttrain.model.linears import DropoutKey, LinearGroup


def apply_linears(x: Tensor, *groups: LinearGroup, tile_tokens: int = 0) -> Tensor:
    """``x`` as the first of ``groups`` takes it -> what the last one makes of it (N, out).

    ``tile_tokens``: the most tokens at a time, a multiple of ``MASK_TOKENS``; 0: all.
    """
    return _ApplyLinears.apply(x, groups, tile_tokens)


class _ApplyLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Sequence[LinearGroup], tile_tokens: int) -> Tensor:
        state, width = groups[0].state, groups[-1].shape.shape[0]
        ctx.groups, ctx.dropout, ctx.tile_tokens = groups, state.dropout, tile_tokens
        ctx.downs = []  # A x̂ (T, R) of each group, by tile; of a recomputation alone
        if state.recomputing and groups[-1].unread:
            ctx.save_for_backward(x)
            return x.new_zeros(()).expand(len(x), width)  # takes no memory
        between = []
        if ctx.needs_input_grad[0]:
            between = [x.new_empty(len(x), group.shape.shape[0]) for group in groups[:-1]]
        y = x.new_empty(len(x), width)
        for rows in _tiles(len(x), tile_tokens):
            outs = [whole[rows] for whole in (*between, y)]
            downs = _forward(groups, x[rows], outs, _at(ctx.dropout, rows))[1]
            if state.recomputing:
                ctx.downs.append(downs)
        ctx.save_for_backward(x, *between, *([y] if groups[-1].reads_output else []))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, *more = ctx.saved_tensors
        grad_x = x.new_empty(x.shape)
        for number, rows in enumerate(_tiles(len(x), ctx.tile_tokens)):
            values = [saved[rows] for saved in (x, *more)]
            downs = ctx.downs[number] if ctx.downs else [None] * len(ctx.groups)
            _backward(ctx.groups, values, downs, grad[rows], grad_x[rows], _at(ctx.dropout, rows))
        ctx.downs = []
        return grad_x, None, None


def _tiles(tokens: int, tile_tokens: int) -> Iterator[slice]:
    step = tile_tokens or max(tokens, 1)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _at(dropout: DropoutKey | None, rows: slice) -> DropoutKey | None:
    return None if dropout is None else dropout.at(rows.start)


def _forward(
    groups: Sequence[LinearGroup], x: Tensor, outs: Sequence[Tensor], dropout: DropoutKey | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """One tile: the output of each group, the last ones in ``outs``, and A x̂ (T, R) of each."""
    made: list[Tensor] = []
    downs: list[Tensor | None] = []
    for group, out in zip(groups, [None] * (len(groups) - len(outs)) + [*outs], strict=True):
        inputs, down = group.enter(made[-1] if made else x, dropout)
        made.append(group.output(inputs, down, out))
        downs.append(down)
    return made, downs


def _backward(
    groups: Sequence[LinearGroup],
    values: list[Tensor],
    downs: list[Tensor | None],
    grad: Tensor,
    out: Tensor,
    dropout: DropoutKey | None,
) -> None:
    """One tile: ``grad`` of the last output -> that of the first input, in ``out``.

    ``values``: what each group took and, where backward reads it, what the last one gave; or what
    the first one took alone. Both lists are used up, so that each tensor is gone when it was read.
    """
    reads_last = groups[-1].reads_output
    if len(values) < len(groups) + reads_last:
        made, again = _forward(groups if reads_last else groups[:-1], values[0], [], dropout)
        values.extend(made)
        downs[: len(again)] = again
        del made, again
    y = values.pop() if reads_last else None
    for group, before in zip(groups[:0:-1], groups[-2::-1], strict=True):
        x = values.pop()
        grad = group.backward(grad, x, downs.pop(), dropout, y=y)
        y = x if before.reads_output else None
        del x
    groups[0].backward(grad, values.pop(), downs.pop(), dropout, out, y)
