"""DoRA: the magnitude of each output trains apart from its direction (Liu et al. 2024).

    y (T, out) = (W x + scaling * B A x) * m / n      n (out,): row norms of W + scaling * B A

n is a constant to the gradient (section 4.3 there). m starts as the row norms of W, so y starts as
that of the frozen linear.

Legend: T tokens, in and out summed over the group, r adapter rank, R adapter ranks summed over the
group, O outputs of the adapted linears together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fttrain.model.rows import row_tiles


class Member(NamedTuple):
    """The slices of one adapted linear in the tensors of its group."""

    rows: slice  # of the group's outputs
    block: slice  # of the R columns of A x (T, R)
    outputs: slice  # of the O outputs of adapted linears, such as B's rows


class Magnitudes:
    """The magnitudes of a group's adapted linears, end to end: ``values`` fp32 (O,)."""

    def __init__(self, values: Tensor, members: Sequence[Member]) -> None:
        self.values, self._members = values, members
        self._squares: Tensor | None = None  # fp32 (O,): of the frozen rows' norms, which are fixed
        self._scale: Tensor | None = None  # m / n, fp32 (O,), until the next update

    def invalidate(self) -> None:
        """Forget m / n: an update changed the adapter."""
        self._scale = None

    def frozen_norms(self, weight: Tensor) -> Tensor:
        """Row norms of the adapted linears in the group's ``weight`` (out, in): fp32 (O,)."""
        if self._squares is None:
            weights = [weight[member.rows] for member in self._members]
            norms = [torch.linalg.vector_norm(w, dim=1, dtype=torch.float32) for w in weights]
            self._squares = torch.cat(norms).square_()
        return self._squares.sqrt()

    def prepare(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        """Compute m / n, once an update, before ``scale_``; backward uses that of its forward.

        ``weight`` (out, in); ``a`` (R, in); ``b``: scaling * B (O, r).
        """
        if self._scale is None:
            self._scale = self.values / self._norms(weight, a, b)

    def scale_(self, y: Tensor) -> Tensor:
        """Multiply ``y`` (T, out), without bias, by m / n where a linear is adapted; in place."""
        assert self._scale is not None
        for member in self._members:
            y[:, member.rows].mul_(self._scale[member.outputs])
        return y

    def gradient(self, grad: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Gradient of m, fp32 (O,). ``grad`` of y and ``y`` (T, out), with ``bias`` (out,)."""
        products = []  # sum over tokens of grad * (y - bias), fp32 (out of the member,)
        for member in self._members:
            grad_part, y_part = grad[:, member.rows], y[:, member.rows]
            if bias is None:
                products.append((grad_part * y_part).sum(0, dtype=torch.float32))
                continue
            # A bias may be a hundred times the value it is added to: it is subtracted in fp32.
            bias_part = bias[member.rows].float()
            product = torch.zeros_like(self.values[member.outputs])
            for rows in row_tiles(grad_part):
                product += (grad_part[rows].float() * (y_part[rows].float() - bias_part)).sum(0)
            products.append(product)
        # y without bias is u * m / n, so m's gradient is grad * u / n; a row of zeros has none.
        return torch.where(self.values == 0, 0.0, torch.cat(products) / self.values)

    def _norms(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Row norms n, fp32 (O,). For each row w of W and b of scaling * B, |w + b A|^2 is
        |w|^2 + 2 b . (A w) + b (A A^T) b, so that W + scaling * B A never exists.
        """
        squares = self.frozen_norms(weight).square_()
        for member in self._members:
            member_a, member_b = a[member.block], b[member.outputs].float()  # (r, in), (out, r)
            crossed = (weight[member.rows] @ member_a.t()).float() * 2  # fp32 (out, r)
            crossed += member_b @ (member_a.float() @ member_a.float().t())
            squares[member.outputs] += crossed.mul_(member_b).sum(1)
        return squares.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()
