"""The output projection with the loss in it, which may train, so that full logits never exist.

Legend: M tokens that have a target, m of them in a chunk, C hidden width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fttrain.model.head import chunk_rows
from fttrain.model.token_loss import (
    add_gradient,
    logits_gradient_,
    metric_sums,
    target_log_probabilities,
)
from fttrain.objective.objective import Objective
from fttrain.objective.supervised import Supervised


class LossHead(nn.Linear):
    """The head in the place of transformers' ``lm_head``: logits, or the loss of targets."""

    def __init__(
        self, weight: nn.Parameter, logit_scale: float, z_loss: float, objective: Objective | None
    ) -> None:
        """``weight`` (V, C), which may be the embedding's; the others as of ``Head``."""
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = weight
        self.logit_scale, self.z_loss = logit_scale, z_loss
        self.objective = objective or Supervised()

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, target_counts: Sequence[int] = ()
    ) -> Tensor:
        """``hidden`` (M, C) -> logits (M, V). With ``targets`` int64 (M,), ``target_counts`` of
        each sequence, in training: the loss sum, fp64 (), whose gradient is that of what is
        minimised; else the sum of each of ``METRICS``, fp64 (metrics,).
        """
        if targets is None:
            return super().forward(hidden) * self.logit_scale
        if self.training:
            return _ChunkedLoss.apply(hidden, self.weight, self, targets, target_counts)
        return metric_sums(_WeightChunks(self, hidden, targets, None, None), hidden.device)


class _WeightChunks:
    """``LogitChunks`` whose gradients are added to ``grad_hidden`` (M, C) and ``grad_weight`` fp32
    (V, C), where these are given.
    """

    def __init__(
        self,
        head: LossHead,
        hidden: Tensor,
        targets: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        self._head, self._hidden, self._targets = head, hidden, targets
        self._grad_hidden, self._grad_weight = grad_hidden, grad_weight
        self._size = chunk_rows(len(head.weight), hidden.dtype, len(hidden))

    def __len__(self) -> int:
        return -(-len(self._hidden) // self._size)

    def forward(self, chunk: int) -> Tensor:
        self._rows = slice(chunk * self._size, (chunk + 1) * self._size)
        self._logits = self._hidden[self._rows] @ self._head.weight.t()  # (m, V)
        if self._head.logit_scale != 1.0:
            self._logits *= self._head.logit_scale
        self._probabilities = torch.empty_like(self._logits, dtype=torch.float32)  # (m, V)
        self._log_probabilities = target_log_probabilities(
            self._logits, self._probabilities, self._targets[self._rows]
        )
        return self._log_probabilities

    def backward(self, coefficients: float | Tensor) -> None:
        logits, rows = self._logits, self._rows
        logits_gradient_(
            logits,
            self._probabilities,
            self._targets[rows],
            self._log_probabilities,
            coefficients,
            self._head.z_loss,
            self._head.logit_scale,
        )
        if self._grad_hidden is not None:
            torch.mm(logits, self._head.weight, out=self._grad_hidden[rows])
        if self._grad_weight is not None:
            self._grad_weight += logits.t() @ self._hidden[rows]


class _ChunkedLoss(torch.autograd.Function):
    """The loss sum. Gradients are computed in forward, chunk by chunk of tokens, so forward alone
    reads the weight: where it is partitioned among the ranks it is gathered once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: LossHead,
        targets: Tensor,
        target_counts: Sequence[int],
    ) -> Tensor:
        into_hidden, into_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if into_hidden else None
        # fp32: a sum over chunks in bf16 would lose what later ones add
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if into_weight else None
        chunks = _WeightChunks(head, hidden, targets, grad_hidden, grad_weight)
        loss_sum = add_gradient(chunks, head.objective, target_counts, hidden.device)
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [None if saved is None else saved.mul_(grad) for saved in ctx.grads]
        ctx.grads = None
        return *grads, None, None, None
