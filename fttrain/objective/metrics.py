"""Evaluation metrics: sums over target tokens, functions of their log-probabilities.

To add one, write a function and enter it in ``METRICS``. It is summed over chunks, micro-batches
and ranks, and evaluation.json has its mean over the target tokens under its name.

Legend: m target tokens of a chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Metric = Callable[[Tensor], Tensor]  # log-probabilities fp32 (m,) -> sum over them, fp64 ()


def nll(log_probabilities: Tensor) -> Tensor:
    """The negative log-likelihood in nats."""
    return -log_probabilities.sum(dtype=torch.float64)


METRICS: dict[str, Metric] = {"nll": nll}
