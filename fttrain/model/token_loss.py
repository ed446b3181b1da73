"""Loss, metrics and gradients of target tokens, chunk by chunk of logits.

An objective with a constant coefficient takes one pass over the chunks, forward and backward of
each at once. Any other takes two: the first gives all log-probabilities, from which the objective
computes a coefficient for each token; the second computes the logits again for their gradient. No
more than one chunk of logits ever exists.

Legend: M target tokens, m of them in a chunk, R >= m rows of a chunk with padding, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fttrain.data.config import ROW_MULTIPLE
from fttrain.objective.metrics import METRICS
from fttrain.objective.objective import Objective, TargetTokens


class LogitChunks(Protocol):
    """The logits of a micro-batch's M target tokens, one chunk at a time."""

    def __len__(self) -> int:
        """The number of chunks."""
        ...

    def forward(self, chunk: int) -> Tensor:
        """Compute the logits of ``chunk``. Return the targets' log-probabilities, fp32 (m,)."""
        ...

    def backward(self, coefficients: float | Tensor) -> None:
        """Add the gradient of the chunk that ``forward`` computed last.

        ``coefficients``: d loss / d log-probability, one for all or fp32 (m,). The logits are
        overwritten.
        """
        ...


def add_gradient(
    chunks: LogitChunks, objective: Objective, target_counts: Sequence[int], device: torch.device
) -> Tensor:
    """Run forward and backward of all ``chunks``. Return the loss sum, fp64 ().

    ``target_counts``: of each sequence; they sum to M.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    constant = objective.constant_coefficient
    if constant is not None:
        for chunk in range(len(chunks)):
            loss_sum += constant * chunks.forward(chunk).sum(dtype=torch.float64)
            chunks.backward(constant)
        return loss_sum
    if not len(chunks):
        return loss_sum
    by_chunk = [chunks.forward(chunk) for chunk in range(len(chunks))]
    result = objective(TargetTokens(torch.cat(by_chunk), tuple(filter(None, target_counts))))
    coefficients = result.coefficients.split([len(values) for values in by_chunk])
    for chunk in range(len(chunks)):
        chunks.forward(chunk)
        chunks.backward(coefficients[chunk])
    return loss_sum + result.loss_sum


def metric_sums(chunks: LogitChunks, device: torch.device) -> Tensor:
    """Run forward of all ``chunks``. Return the sum of each of ``METRICS``, fp64 (metrics,)."""
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
    for chunk in range(len(chunks)):
        log_probabilities = chunks.forward(chunk)
        sums += torch.stack([metric(log_probabilities) for metric in METRICS.values()])
    return sums


def target_log_probabilities(logits: Tensor, probabilities: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of ``targets`` int64 (m,): fp32 (m,).

    ``logits`` (R, V) in any dtype; ``probabilities`` fp32 (R, V) becomes their softmax.
    """
    pieces = logits.split(ROW_MULTIPLE), probabilities.split(ROW_MULTIPLE)
    for logit_rows, out in zip(*pieces, strict=True):  # softmax copies its whole input to fp32
        torch.softmax(logit_rows, dim=-1, dtype=torch.float32, out=out)
    rows = torch.arange(len(targets), device=targets.device)
    # A target less likely than fp32 can represent counts as 87 nats; its gradient is exact anyway.
    return probabilities[rows, targets].clamp_min_(torch.finfo(torch.float32).tiny).log_()


def logits_gradient_(
    logits: Tensor,
    probabilities: Tensor,
    targets: Tensor,
    log_probabilities: Tensor,
    coefficients: float | Tensor,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
) -> None:
    """``logits`` (R, V) become the gradient with respect to the logits before ``logit_scale``.

    ``probabilities`` and ``log_probabilities`` as of ``target_log_probabilities``, the former are
    overwritten; ``coefficients`` as of ``LogitChunks.backward``. With ``z_loss`` the gradient is
    that of the loss plus ``z_loss`` times each token's squared log-sum-exp.
    """
    m = len(targets)
    rows = torch.arange(m, device=targets.device)
    weights: float | Tensor = -coefficients  # of each row's probabilities
    if z_loss:
        # A token's log-sum-exp is the logit less the log-probability of any word: the target's.
        log_sum_exp = logits[rows, targets].float() - log_probabilities  # fp32 (m,)
        weights = weights + 2 * z_loss * log_sum_exp
    if isinstance(weights, Tensor):
        probabilities[:m] *= weights[:, None]
    elif weights != 1.0:
        probabilities[:m] *= weights
    probabilities[rows, targets] += coefficients
    if logit_scale != 1.0:
        probabilities *= logit_scale
    logits.copy_(probabilities)
