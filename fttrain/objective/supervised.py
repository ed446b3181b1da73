"""Supervised fine-tuning: the negative log-likelihood of the targets."""

from dataclasses import dataclass

import torch

from fttrain.objective.objective import ObjectiveResult, TargetTokens


@dataclass(frozen=True)
class Supervised:
    """The sum of -log p(target) over the target tokens."""

    @property
    def constant_coefficient(self) -> float | None:
        return -1.0

    def __call__(self, tokens: TargetTokens) -> ObjectiveResult:
        log_probabilities = tokens.log_probabilities
        return ObjectiveResult(
            -log_probabilities.sum(dtype=torch.float64), torch.full_like(log_probabilities, -1.0)
        )
