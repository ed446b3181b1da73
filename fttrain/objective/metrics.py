"""Evaluation metrics: functions of the log-probabilities of a chunk of targets.

A metric returns a sum over targets; sums are added over chunks, micro-batches and ranks, divided by
the number of targets, and written to evaluation.json under the metric's name. To add one: a
function here, and its entry in ``METRICS``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def nll(log_probs: Tensor) -> Tensor:
    """The negative log-likelihood, nats: ``log_probs`` fp32 (m,) -> fp64 scalar."""
    return -log_probs.sum(dtype=torch.float64)


METRICS: dict[str, Callable[[Tensor], Tensor]] = {"nll": nll}


def metric_sums(log_probs: Tensor) -> Tensor:
    """All metrics of a chunk, in the order of ``METRICS``: fp32 (m,) -> fp64 (metrics,)."""
    return torch.stack([metric(log_probs) for metric in METRICS.values()])


def no_sums(device: torch.device) -> Tensor:
    """The sums over no targets: fp64 (metrics,)."""
    return torch.zeros(len(METRICS), dtype=torch.float64, device=device)


@dataclass(frozen=True)
class EvaluationSums:
    """The metrics of held-out rows, over all ranks."""

    sums: Mapping[str, float]  # metric -> its sum over the targets
    targets: int  # tokens that have a target

    def mean(self, metric: str) -> float:
        """``metric`` per target; 0 without targets."""
        return self.sums[metric] / max(1, self.targets)

    @staticmethod
    def of(sums: list[float], targets: int) -> "EvaluationSums":
        """``sums`` in the order of ``METRICS``."""
        return EvaluationSums(dict(zip(METRICS, sums, strict=True)), targets)
