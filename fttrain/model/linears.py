"""A group of frozen linears with LoRA: one autograd function for prologue, linears and adapters.

    x ── prologue ── x̂ (N, in) ──┬── frozen W (out, in), dequantised now ──┐
                                 └── A (R, in) ── scaling * B (out, r) ────┴── y (N, out)

A prologue is none, rmsnorm or swiglu.

Saved for backward: the prologue's input and nothing else (a recomputation also keeps x̂ until its
own backward). The frozen bytes are read again at backward time, whatever slot they lie in by then;
no view of a slot and no dequantised weight is ever saved. Adapter gradients go straight into the
layer's flat fp32 gradient.

Legend: N tokens, in and out summed over the group, R adapter ranks summed over the group.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fttrain.model.functions import rms_norm, rms_norm_backward, swiglu, swiglu_backward
from fttrain.model.lora import GroupAdapter
from fttrain.quant.frozen_layer import FrozenLayer, GroupShape


@dataclass(frozen=True)
class DropoutKey:
    """What a dropout mask depends on, beside layer and module: never the order of execution."""

    seed: int
    step: int
    micro_batch: int  # its index in the step over all ranks

    def generator(self, layer: int, module: str, device: torch.device) -> torch.Generator:
        text = f"{self.seed}/{self.step}/{self.micro_batch}/{layer}/{module}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class LayerState:
    """What changes while a layer's modules stay; the schedule binds it around each use."""

    def __init__(self) -> None:
        self.frozen: FrozenLayer | None = None  # the layer's bytes, from the store
        self.lengths: tuple[int, ...] = ()  # of each document in the micro-batch that passes now
        self.dropout: DropoutKey | None = None  # None: no dropout (evaluation)
        self.recomputing = False  # True: outputs that backward never reads may be left out
        self.cache: object | None = None  # keys and values of earlier tokens, in generation


class LinearGroup(nn.Module):
    """The module a decoder layer calls: applies the group to its input."""

    def __init__(
        self,
        shape: GroupShape,
        layer: int,
        state: LayerState,
        adapter: GroupAdapter | None,
        prologue: str,
        norm: str = "",
        eps: float = 0.0,
        unread: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.layer = layer
        self.state = state
        self.adapter = adapter
        self.prologue = prologue  # none | rmsnorm | swiglu
        self.norm = norm  # the frozen norm weight of an rmsnorm prologue
        self.eps = eps
        self.unread = unread  # backward never reads this group's output

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, in), or gate and up (N, 2 * in) for a swiglu prologue -> y (N, out)."""
        if self.state.recomputing and self.unread:
            return _Unread.apply(x, self)
        return _Forward.apply(x, self)

    @property
    def frozen(self) -> FrozenLayer:
        assert self.state.frozen is not None, (
            f"layer {self.layer} is used outside the store's get and release"
        )
        return self.state.frozen

    def prologue_forward(self, x: Tensor) -> Tensor:
        if self.prologue == "rmsnorm":
            return rms_norm(x, self.frozen.tensor(self.norm), self.eps)
        return swiglu(x) if self.prologue == "swiglu" else x

    def prologue_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.prologue == "rmsnorm":
            return rms_norm_backward(grad, x, self.frozen.tensor(self.norm), self.eps)
        return swiglu_backward(grad, x) if self.prologue == "swiglu" else grad

    def output(self, inputs: Tensor, down: Tensor | None) -> Tensor:
        """x̂ (N, in) and A x̂ (N, R) -> y (N, out)."""
        y = torch.nn.functional.linear(
            inputs, self.frozen.weight(self.shape.name), self.frozen.bias(self.shape.name)
        )
        if self.adapter is not None and down is not None:
            self.adapter.add_to_(y, down)
        return y

    def input_gradient(
        self, grad: Tensor, inputs: Tensor, down: Tensor | None, dropout: DropoutKey | None
    ) -> Tensor:
        """``grad`` of y (N, out) -> that of x̂ (N, in). Adds the adapter's to the layer's."""
        grad_inputs = grad @ self.frozen.weight(self.shape.name)
        if self.adapter is not None and down is not None:
            grad_down = self.adapter.down_gradient(grad)
            grad_a = _down_projection_backward(self, grad_down, inputs, grad_inputs, dropout)
            self.adapter.accumulate(grad_a, down, grad)
        return grad_inputs


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup) -> Tensor:
        ctx.save_for_backward(x)
        ctx.group, ctx.dropout = group, group.state.dropout
        inputs = group.prologue_forward(x)
        down = _down_projection(group, inputs, ctx.dropout)
        # Backward follows a recomputation at once: what it needs is kept for that moment.
        ctx.kept = (inputs, down) if group.state.recomputing else None
        return group.output(inputs, down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        group: LinearGroup = ctx.group
        if ctx.kept is None:
            inputs = group.prologue_forward(x)
            ctx.kept = inputs, _down_projection(group, inputs, ctx.dropout)
        inputs, down = ctx.kept
        grad_inputs = group.input_gradient(grad, inputs, down, ctx.dropout)
        ctx.kept = None
        return group.prologue_backward(grad_inputs, x), None


class _Unread(_Forward):
    """The same node without its forward GEMM: a zero that takes no memory is its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup) -> Tensor:
        ctx.save_for_backward(x)
        ctx.group, ctx.dropout, ctx.kept = group, group.state.dropout, None
        return x.new_zeros(()).expand(x.shape[0], group.shape.shape[0])


def _down_projection(
    group: LinearGroup, inputs: Tensor, dropout: DropoutKey | None
) -> Tensor | None:
    """``inputs`` (N, in) -> A @ dropout(inputs) (N, R); a mask for each member, as in PEFT."""
    adapter = group.adapter
    if adapter is None:
        return None
    if dropout is None or adapter.dropout == 0:
        return inputs @ adapter.a.t()
    parts = [
        (inputs * _mask(group, member, inputs, dropout)) @ a.t()
        for member, a in zip(adapter.members, adapter.a.split(adapter.r), strict=True)
    ]
    return torch.cat(parts, dim=-1)


def _down_projection_backward(
    group: LinearGroup,
    grad_down: Tensor,
    inputs: Tensor,
    grad_inputs: Tensor,
    dropout: DropoutKey | None,
) -> Tensor:
    """``grad_down`` (N, R) -> gradient of A (R, in).

    Adds the inputs' share to ``grad_inputs`` (N, in).
    """
    adapter = group.adapter
    assert adapter is not None
    if dropout is None or adapter.dropout == 0:
        grad_inputs.addmm_(grad_down, adapter.a)
        return grad_down.t() @ inputs
    grads = []
    for member, a, grad in zip(
        adapter.members, adapter.a.split(adapter.r), grad_down.split(adapter.r, dim=-1), strict=True
    ):
        mask = _mask(group, member, inputs, dropout)
        grad_inputs.add_((grad @ a).mul_(mask))
        grads.append(grad.t() @ (inputs * mask))
    return torch.cat(grads)


def _mask(group: LinearGroup, member: int, inputs: Tensor, dropout: DropoutKey) -> Tensor:
    """Like ``inputs``: 0 with the dropout's probability, 1 / (1 - probability) elsewhere."""
    assert group.adapter is not None
    keep = 1 - group.adapter.dropout
    module = f"{group.shape.name}.{member}"
    generator = dropout.generator(group.layer, module, inputs.device)
    return torch.empty_like(inputs).bernoulli_(keep, generator=generator).div_(keep)
