"""A group of frozen linears with LoRA, on a tile of tokens: prologue, linears and adapters.

    x ── prologue ── x̂ (T, in) ──┬── frozen W (out, in), dequantised ──────┐
                                 └── A (R, in) ── scaling * B (out, r) ────┴── y (T, out)

A prologue is none, rmsnorm or swiglu.

Backward needs the prologue's input and nothing else (after a recomputation also A x̂). It reads the
frozen bytes again, in whatever slot they lie by then; no view of a slot and no dequantised weight
is ever saved. Adapter gradients are added to the layer's flat fp32 gradient. tiles.py saves tensors
for backward and cuts tokens into tiles.

Legend: T tokens, in and out summed over the group, R adapter ranks summed over the group. Tensors
are in the compute dtype where no other stands beside them.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fttrain.model.config import MASK_TOKENS
from fttrain.model.functions import rms_norm, rms_norm_backward, swiglu, swiglu_backward
from fttrain.model.lora import GroupAdapter
from fttrain.quant.frozen_layer import FrozenLayer, GroupShape


@dataclass(frozen=True)
class DropoutKey:
    """The counters from which a dropout mask is drawn, beside layer and module. Neither the order
    of execution nor the tiles of tokens change a mask.
    """

    seed: int
    step: int
    micro_batch: int  # index in the step over all ranks
    block: int = 0  # the tile's first block of MASK_TOKENS tokens, counted in the micro-batch

    def at(self, token: int) -> "DropoutKey":
        """The key of a tile that begins with ``token`` of the micro-batch."""
        assert token % MASK_TOKENS == 0, f"no block of a mask begins with token {token}"
        return replace(self, block=token // MASK_TOKENS)

    def seed_of(self, layer: int, module: str, block: int) -> int:
        """The generator's seed for the mask of ``block``, counted from the tile's first."""
        path = f"{self.seed}/{self.step}/{self.micro_batch}/{layer}/{module}/{self.block + block}"
        digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


class LayerState:
    """The mutable state of a layer, which the schedule binds around each use."""

    def __init__(self) -> None:
        self.frozen: FrozenLayer | None = None  # the layer's bytes, from the store
        self.lengths: tuple[int, ...] = ()  # tokens of each document of the micro-batch
        self.dropout: DropoutKey | None = None  # None: no dropout (evaluation)
        self.recomputing = False  # True: outputs that backward never reads may be skipped
        self.cache: object | None = None  # keys and values of earlier tokens, in generation


class LinearGroup:
    """One group of a layer: its prologue, its frozen linears and its adapter."""

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
        self.shape = shape
        self.layer = layer
        self.state = state
        self.adapter = adapter
        self.prologue = prologue  # none | rmsnorm | swiglu
        self.norm = norm  # name of the frozen norm weight (in,) of an rmsnorm prologue
        self.eps = eps
        self.unread = unread  # backward never reads this group's output

    @property
    def frozen(self) -> FrozenLayer:
        assert self.state.frozen is not None, (
            f"layer {self.layer} is used outside the store's get and release"
        )
        return self.state.frozen

    def enter(self, x: Tensor, dropout: DropoutKey | None) -> tuple[Tensor, Tensor | None]:
        """Return x̂ (T, in) and A x̂ (T, R) of ``x`` (T, in), or of gate and up (T, 2 * in) with a
        swiglu prologue. A x̂ is None without an adapter.
        """
        inputs = self._prologue(x)
        return inputs, _down_projection(self, inputs, dropout)

    def output(self, inputs: Tensor, down: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Return y (T, out) of ``inputs`` x̂ (T, in) and ``down`` A x̂ (T, R); in ``out`` where
        given.
        """
        weight = self.frozen.weight(self.shape.name)  # (out, in)
        bias = self.frozen.bias(self.shape.name)  # (out,) or None
        magnitudes = None if self.adapter is None else self.adapter.magnitudes
        if bias is None or magnitudes is not None:
            y = torch.mm(inputs, weight.t(), out=out)
        else:
            y = torch.addmm(bias, inputs, weight.t(), out=out)
        if self.adapter is not None and down is not None:
            self.adapter.add_to_(y, down)
            if magnitudes is not None:
                magnitudes.prepare(weight, self.adapter.a, self.adapter.b)
                magnitudes.scale_(y)
                y = y if bias is None else y.add_(bias)
        return y

    @property
    def reads_output(self) -> bool:
        """Whether backward reads the group's output, as the gradient of magnitudes does."""
        return self.adapter is not None and self.adapter.magnitudes is not None

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        down: Tensor | None,
        dropout: DropoutKey | None,
        out: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of ``x``, the argument of ``enter``, from ``grad`` of y (T, out); in
        ``out`` where given. Adds the adapter's gradient to the layer's.

        ``down``: A x̂ (T, R), None: compute it again; ``y`` (T, out): where ``reads_output``.
        """
        if self.adapter is not None and self.reads_output:
            assert y is not None
            grad = self.adapter.undo_magnitudes(grad, y, self.frozen.bias(self.shape.name))
        inputs = self._prologue(x)
        if down is None:
            down = _down_projection(self, inputs, dropout)
        if self.prologue == "none":
            return self._input_gradient(grad, inputs, down, dropout, out)
        grad_inputs = self._input_gradient(grad, inputs, down, dropout)  # (T, in)
        del inputs  # as wide as the MLP where the prologue is swiglu
        if self.prologue == "rmsnorm":
            return rms_norm_backward(
                grad_inputs, x, self.frozen.tensor(self.norm), self.eps, out=out
            )
        return swiglu_backward(grad_inputs, x, out=out)

    def _prologue(self, x: Tensor) -> Tensor:
        if self.prologue == "rmsnorm":
            return rms_norm(x, self.frozen.tensor(self.norm), self.eps)
        return swiglu(x) if self.prologue == "swiglu" else x

    def _input_gradient(
        self,
        grad: Tensor,
        inputs: Tensor,
        down: Tensor | None,
        dropout: DropoutKey | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of x̂ (T, in) from ``grad`` of y (T, out). Adds the adapter's gradient
        to the layer's.
        """
        grad_inputs = torch.mm(grad, self.frozen.weight(self.shape.name), out=out)
        if self.adapter is not None and down is not None:
            grad_down = self.adapter.down_gradient(grad)  # (T, R)
            grad_a = _down_projection_backward(self, grad_down, inputs, grad_inputs, dropout)
            self.adapter.accumulate(grad_a, down, grad)
        return grad_inputs


def _down_projection(
    group: LinearGroup, inputs: Tensor, dropout: DropoutKey | None
) -> Tensor | None:
    """Return A @ dropout(``inputs``) (T, R) of ``inputs`` (T, in); each member has a mask, as in
    PEFT.
    """
    adapter = group.adapter
    if adapter is None:
        return None
    if dropout is None or adapter.dropout == 0:
        return inputs @ adapter.a.t()
    parts = [
        _mask(group, member, inputs, dropout).mul_(inputs) @ a.t()
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
    """Return the gradient of A (R, in) from ``grad_down`` (T, R). Adds the adapter's share of the
    inputs' gradient to ``grad_inputs`` (T, in).
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
        grads.append(grad.t() @ mask.mul_(inputs))
    return torch.cat(grads)


def _mask(group: LinearGroup, member: int, inputs: Tensor, dropout: DropoutKey) -> Tensor:
    assert group.adapter is not None
    module = f"{group.shape.name}.{member}"
    return dropout_mask(inputs, group.adapter.dropout, dropout, group.layer, module)


def dropout_mask(
    inputs: Tensor, probability: float, key: DropoutKey, layer: int, module: str
) -> Tensor:
    """The mask of ``inputs`` (T, in), with their shape and dtype: 0 with ``probability``, else
    1 / (1 - probability).

    ``module``: the linear's group and its index in it, such as qkv.0.
    """
    mask, generator = inputs.new_empty(inputs.shape), torch.Generator(inputs.device)
    for block, rows in enumerate(mask.split(MASK_TOKENS)):
        generator.manual_seed(key.seed_of(layer, module, block))
        rows.bernoulli_(1 - probability, generator=generator)
    return mask.div_(1 - probability)
