"""LoRA adapters of a group of linears.

LoRA (Hu et al. 2021) adds ``scaling * B @ A`` to a frozen weight; A (r, in) starts random and
B (out, r) zero:

    x (N, in) ──── frozen W (out, in) ────────────┐
        └── A (r, in) ── B (out, r) ── * scaling ─┴── y (N, out)

The linears of a group share their input, so their A's are stacked to one (R, in), R = members * r.
Each B reads r columns of A x and adds to its linear's part of y. With DoRA each adapted linear has
magnitudes, too (dora.py).

Legend: N tokens, in and out summed over the group, r adapter rank, R adapter ranks summed over the
group, O outputs of the adapted linears together. Tensors are in the compute dtype where no other
stands beside them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.model.config import LoraConfig
from fttrain.model.dora import Magnitudes, Member
from fttrain.quant.frozen_layer import GroupShape
from fttrain.util.errors import UserError


@dataclass(frozen=True)
class GroupMembers:
    """A group's shapes and the names of its linears in the layer, such as self_attn.q_proj."""

    shape: GroupShape
    paths: tuple[str, ...]


def target_indices(groups: Iterable[GroupMembers], config: LoraConfig) -> dict[str, list[int]]:
    """The indices of each group's members that get an adapter, by the group's name.

    Raises UserError for a name that no linear has.
    """
    groups = list(groups)
    known = [path.rsplit(".", 1)[-1] for group in groups for path in group.paths]
    wanted = known if config.target_modules == "all-linear" else list(config.target_modules)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(
            f"lora.target_modules: no linear is called {', '.join(unknown)}; there are "
            f"{', '.join(known)}"
        )
    return {
        group.shape.name: [
            i for i, path in enumerate(group.paths) if path.rsplit(".", 1)[-1] in wanted
        ]
        for group in groups
    }


class GroupAdapter:
    """One group's adapter: views into the layer's flat gradient and compute copies."""

    def __init__(self, group: GroupMembers, members: list[int], config: LoraConfig) -> None:
        self.group = group
        self.members = members
        self.r = config.r
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.rank = len(members) * config.r  # R
        self.use_dora = config.use_dora
        self._members = list(_member_parts(group.shape, members, config.r))

    @property
    def sizes(self) -> dict[str, int]:
        """The number of values by section: a: all A's, b: all B's, m: all magnitudes of DoRA."""
        outputs = self._members[-1].outputs.stop  # O
        sizes = {"a": self.rank * self.group.shape.in_features, "b": outputs * self.r}
        return sizes | {"m": outputs} if self.use_dora else sizes

    def bind_copies(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Bind this adapter's parts of the compute copies: A's (R, in), scaling * B (O, r),
        magnitudes fp32 (O,). GEMMs are in ``dtype``.
        """
        self._a, self._b = self._shaped(parts)
        self._dtype = dtype
        self.magnitudes = Magnitudes(parts["m"], self._members) if self.use_dora else None

    @property
    def a(self) -> Tensor:
        """All A's (R, in) in the compute dtype."""
        return self._a.to(self._dtype)

    @property
    def b(self) -> Tensor:
        """scaling * B of all members (O, r) in the compute dtype."""
        return self._b.to(self._dtype)

    def bind_gradient(self, parts: Mapping[str, Tensor]) -> None:
        """Bind this adapter's parts of the layer's flat fp32 gradient, to which backward adds."""
        self.a_grad, self.b_grad = self._shaped(parts)
        self.m_grad = parts.get("m")

    def _shaped(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """All A's (R, in) and all B's (O, r), as views."""
        return parts["a"].view(self.rank, -1), parts["b"].view(-1, self.r)

    def invalidate(self) -> None:
        """Forget values derived from the compute copies: an update changed them."""
        if self.magnitudes is not None:
            self.magnitudes.invalidate()

    def add_to_(self, y: Tensor, down: Tensor) -> None:
        """Add scaling * B ``down`` to ``y`` (N, out), with ``down`` = A x (N, R)."""
        b = self.b
        for member in self._members:
            y[:, member.rows].addmm_(down[:, member.block], b[member.outputs].t())

    def down_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of A x (N, R) from ``grad`` of y (N, out)."""
        b = self.b
        parts = [grad[:, member.rows] @ b[member.outputs] for member in self._members]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def accumulate(self, grad_a: Tensor, down: Tensor, grad: Tensor) -> None:
        """Add to the fp32 gradient: ``grad_a`` (R, in), and the gradient of B from ``down`` = A x
        (N, R) and ``grad`` of y (N, out).
        """
        self.a_grad.add_(grad_a)
        for rows, block, outputs in self._members:
            # (r, out) and then transposed: the GEMM is faster that way round on a CPU
            b_grad = (down[:, block].t() @ grad[:, rows]).t()
            self.b_grad[outputs].add_(b_grad, alpha=self.scaling)

    def undo_magnitudes(self, grad: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Gradient (N, out) of the magnitudes' input, from ``grad`` of y (N, out). Adds the
        magnitudes' gradient to the fp32 gradient.

        ``y`` (N, out) with the group's ``bias`` (out,).
        """
        assert self.magnitudes is not None
        assert self.m_grad is not None
        self.m_grad.add_(self.magnitudes.gradient(grad, y, bias))
        return self.magnitudes.scale_(grad.clone())

    def named(self, layer: int, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of each A (r, in), B (out, r) and magnitude vector (out,) in this adapter's
        parts of a flat tensor.
        """
        a, b = self._shaped(parts)
        for path, (_, block, outputs) in zip(self._paths, self._members, strict=True):
            name = f"model.layers.{layer}.{path}"
            yield f"{name}.lora_A", a[block]
            yield f"{name}.lora_B", b[outputs]
            if self.use_dora:
                yield f"{name}.lora_magnitude_vector", parts["m"][outputs]

    @property
    def _paths(self) -> list[str]:
        return [self.group.paths[member] for member in self.members]


def _member_parts(shape: GroupShape, members: list[int], r: int) -> Iterator[Member]:
    end = 0
    for index, member in enumerate(members):
        start, end = end, end + shape.out_features[member]
        yield Member(shape.rows[member], slice(index * r, (index + 1) * r), slice(start, end))
