"""DoRA: the magnitude of each output is learnt apart from its direction (Liu et al. 2024).

    y (T, out) = (W x + scaling * B A x) * m / n      n (out,): row norms of W + scaling * B A

n is a constant to the gradient (section 4.3 there), and m starts as the row norms of W, so at the
start y is that of the frozen linear.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fttrain.model.rows import row_tiles


class Member(NamedTuple):
    """Where one adapted linear of a group has its parts."""

    rows: slice  # of the group's output
    block: slice  # of A x (T, R)
    own: slice  # of what has the outputs of adapted linears alone, end to end


class Magnitudes:
    """Those of a group's adapted linears, end to end: ``values`` fp32 (adapted outputs,)."""

    def __init__(self, values: Tensor, members: Sequence[Member]) -> None:
        self.values, self._members = values, members
        self._squares: Tensor | None = None  # of the frozen rows' norms, which never change
        self._scale: Tensor | None = None  # m / n, until the next update

    def changed(self) -> None:
        """An update has come."""
        self._scale = None

    def frozen_norms(self, weight: Tensor) -> Tensor:
        """Row norms of the group's ``weight`` (out, in): fp32 (adapted outputs,)."""
        if self._squares is None:
            rows = [weight[member.rows] for member in self._members]
            norms = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float32) for each in rows]
            self._squares = torch.cat(norms).square_()
        return self._squares.sqrt()

    def prepare(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        """Have m / n, once an update, before ``scale_``; backward follows a forward that had it.

        ``weight`` (out, in); ``a`` (R, in); ``b``: scaling * B (adapted outputs, r).
        """
        if self._scale is None:
            self._scale = self.values / self._norms(weight, a, b)

    def scale_(self, y: Tensor) -> Tensor:
        """``y`` (T, out) without bias, times m / n where a linear is adapted, in place."""
        assert self._scale is not None
        for member in self._members:
            y[:, member.rows].mul_(self._scale[member.own])
        return y

    def gradient(self, grad: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """That of m, fp32 (adapted outputs,). ``grad`` of y and ``y`` (T, out), with bias."""
        found = []
        for member in self._members:
            own, ours = grad[:, member.rows], y[:, member.rows]
            if bias is None:
                found.append((own * ours).sum(0, dtype=torch.float32))
                continue
            # A bias may be a hundred times what it is added to: it is taken off in fp32.
            product, added = torch.zeros_like(self.values[member.own]), bias[member.rows].float()
            for rows in row_tiles(own):
                product += (own[rows].float() * (ours[rows].float() - added)).sum(0)
            found.append(product)
        # y without bias is u * m / n, and the gradient that of u / n; a row of zeros has none.
        return torch.where(self.values == 0, 0.0, torch.cat(found) / self.values)

    def _norms(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """|w + b A|^2 = |w|^2 + 2 b . (A w) + b (A A^T) b for each row w of W and b of scaling * B:
        W + scaling * B A is never made.
        """
        squares = self.frozen_norms(weight).square_()
        for member in self._members:
            own_a, own_b = a[member.block], b[member.own].float()
            crossed = (weight[member.rows] @ own_a.t()).float() * 2  # (out, r)
            crossed += own_b @ (own_a.float() @ own_a.float().t())
            squares[member.own] += crossed.mul_(own_b).sum(1)
        return squares.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()
