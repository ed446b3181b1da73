"""The frozen tensors of one layer in its flat buffer: 4-bit linears by group, norms and biases.

Linears that share an input form a group (q, k and v; gate and up). Their codes lie end to end, so a
group is dequantised by one kernel and multiplied by one GEMM.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.quant.config import QuantConfig
from fttrain.quant.layout import Layout
from fttrain.quant.scheme import NESTED_BLOCKSIZE, QuantisedWeight, dequantise, dequantise_scales


@dataclass(frozen=True)
class GroupShape:
    """The linears of one group: weights (out_features[i], in_features), stacked by rows."""

    name: str  # qkv | o | gate_up | down
    in_features: int
    out_features: tuple[int, ...]  # one for each member
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.out_features), self.in_features

    @property
    def rows(self) -> list[slice]:
        """The rows of each member in the stacked weight."""
        ends = [sum(self.out_features[: i + 1]) for i in range(len(self.out_features))]
        return [slice(end - out, end) for end, out in zip(ends, self.out_features, strict=True)]


@dataclass(frozen=True)
class _Scales:
    """The spans of one member's scales: codes in ``absmax``, the scales of these in
    ``nested_absmax``.
    """

    codes: slice
    nested: slice


def _member_scales(group: GroupShape, blocksize: int) -> list[_Scales]:
    members, codes_end, nested_end = [], 0, 0
    for out in group.out_features:
        codes = out * group.in_features // blocksize
        nested = -(-codes // NESTED_BLOCKSIZE)
        members.append(
            _Scales(slice(codes_end, codes_end + codes), slice(nested_end, nested_end + nested))
        )
        codes_end, nested_end = codes_end + codes, nested_end + nested
    return members


class FrozenFormat:
    """The layout of a layer's frozen tensors. One object serves all layers of a model.

    ``plain``: name -> shape of the tensors that are not quantised but stored in ``dtype`` (norm
    weights).
    """

    def __init__(
        self,
        groups: Iterable[GroupShape],
        plain: dict[str, tuple[int, ...]],
        quant: QuantConfig,
        dtype: torch.dtype,
    ) -> None:
        self.groups = {group.name: group for group in groups}
        self.quant = quant
        self.dtype = dtype
        self.scales = {
            name: _member_scales(group, quant.blocksize) for name, group in self.groups.items()
        }
        self.layout = Layout(self._tensors(plain))

    def _tensors(
        self, plain: dict[str, tuple[int, ...]]
    ) -> Iterable[tuple[str, tuple[int, ...], torch.dtype]]:
        for name, group in self.groups.items():
            rows, columns = group.shape
            if group.bias:
                yield f"{name}.bias", (rows,), self.dtype
            if not self.quant.is_quantised:
                yield f"{name}.weight", (rows, columns), self.dtype
                continue
            last = self.scales[name][-1]
            yield f"{name}.packed", (rows * columns // 2,), torch.uint8
            yield (
                f"{name}.absmax",
                (last.codes.stop,),
                torch.uint8 if self.quant.double_quant else torch.float32,
            )
            if self.quant.double_quant:
                yield f"{name}.nested_absmax", (last.nested.stop,), torch.float32
                yield f"{name}.offset", (len(group.out_features),), torch.float32
        for name, shape in plain.items():
            yield name, shape, self.dtype

    def write_quantised(
        self, views: dict[str, Tensor], name: str, member: int, weight: QuantisedWeight
    ) -> None:
        """Copy one member's 4-bit weight into the layer's ``views``."""
        group, scales = self.groups[name], self.scales[name][member]
        rows = group.rows[member]
        half = group.in_features // 2
        views[f"{name}.packed"][rows.start * half : rows.stop * half] = weight.packed
        views[f"{name}.absmax"][scales.codes] = weight.absmax
        if weight.nested_absmax is not None and weight.offset is not None:
            views[f"{name}.nested_absmax"][scales.nested] = weight.nested_absmax
            views[f"{name}.offset"][member] = weight.offset[0]


class FrozenLayer:
    """The frozen tensors of one layer, valid until the store's ``release``.

    With ``dequant=layer`` each group is dequantised at its first use, and the weight lives as long
    as this object.
    """

    def __init__(self, flat: Tensor, frozen_format: FrozenFormat) -> None:
        self.flat = flat  # uint8 (layout.size_bytes,)
        self._format = frozen_format
        self._views = frozen_format.layout.views(flat)
        self._dequantised: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not quantised, in the model's dtype."""
        return self._views[name]

    def bias(self, group: str) -> Tensor | None:
        """The biases of a group's members, stacked (sum of out_features,)."""
        return self._views.get(f"{group}.bias")

    def weight(self, group: str) -> Tensor:
        """The group's stacked weight (sum of out_features, in_features) in the model's dtype."""
        quant = self._format.quant
        if not quant.is_quantised:
            return self._views[f"{group}.weight"]
        if group in self._dequantised:
            return self._dequantised[group]
        weight = dequantise(
            self._views[f"{group}.packed"],
            self._scales(group),
            self._format.groups[group].shape,
            quant,
            self._format.dtype,
        )
        if quant.dequant == "layer":
            self._dequantised[group] = weight
        return weight

    def _scales(self, group: str) -> Tensor:
        """The scales of the group's blocks, fp32 (weights of the group / blocksize,)."""
        absmax = self._views[f"{group}.absmax"]
        if not self._format.quant.double_quant:
            return absmax
        nested, offset = self._views[f"{group}.nested_absmax"], self._views[f"{group}.offset"]
        members = self._format.scales[group]
        return torch.cat(
            [
                dequantise_scales(absmax[scales.codes], nested[scales.nested], offset[member])
                for member, scales in enumerate(members)
            ]
        )
