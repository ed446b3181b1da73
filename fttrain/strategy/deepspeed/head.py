"""The output projection with the loss in it, which may train, so that full logits never exist.

Legend: M tokens that have a target, C hidden width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fttrain.model.head import chunk_rows, cross_entropy_


class LossHead(nn.Linear):
    """Stands where transformers' model has its ``lm_head``: with targets it gives the loss."""

    def __init__(self, weight: nn.Parameter, logit_scale: float = 1.0, z_loss: float = 0.0) -> None:
        """``weight`` (V, C), which may be the embedding's; ``z_loss``: as ``Head``."""
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = weight
        self.logit_scale, self.z_loss = logit_scale, z_loss

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """``hidden`` (M, C) -> logits (M, V); with ``targets`` int64 (M,) their loss sum, fp64
        scalar, whose gradient is that of what is minimised.
        """
        if targets is None:
            return super().forward(hidden) * self.logit_scale
        return _ChunkedLoss.apply(hidden, self.weight, targets, self.logit_scale, self.z_loss)


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken at once, chunk by chunk of tokens, so the projection is used in forward
    alone: where it is divided among the ranks it is gathered for that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        logit_scale: float,
        z_loss: float,
    ) -> Tensor:
        into_hidden, into_weight = ctx.needs_input_grad[:2]
        want = into_hidden or into_weight
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if into_hidden else None
        # fp32: a sum over chunks in bf16 would lose what later ones add
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if into_weight else None
        size = chunk_rows(len(weight), hidden.dtype, len(hidden))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = hidden[rows] @ weight.t()
            if logit_scale != 1.0:
                logits *= logit_scale
            probabilities = torch.empty_like(logits, dtype=torch.float32)
            total += cross_entropy_(logits, probabilities, targets[rows], z_loss, logit_scale, want)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += logits.t() @ hidden[rows]
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [None if own is None else own.mul_(grad) for own in ctx.grads]
        ctx.grads = None
        return *grads, None, None, None
