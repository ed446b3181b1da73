"""Objectives of the tests' own, and their losses in plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fttrain.objective.objective import ObjectiveResult, TargetTokens
from fttrain.objective.supervised import Supervised

BETA = 0.1


@dataclass(frozen=True)
class Sequences:
    """-log sigmoid(BETA * the sequence's log-probability), summed over sequences."""

    constant_coefficient: float | None = None

    def __call__(self, tokens: TargetTokens) -> ObjectiveResult:
        pieces = tokens.log_probabilities.split(tokens.lengths)
        scores = BETA * torch.stack([piece.sum() for piece in pieces]).double()
        slopes = (-BETA * torch.sigmoid(-scores)).float()
        coefficients = [slopes[i].expand(len(piece)) for i, piece in enumerate(pieces)]
        loss = -torch.nn.functional.logsigmoid(scores).sum()
        return ObjectiveResult(loss, torch.cat(coefficients))


@dataclass(frozen=True)
class Weighted:
    """-log p of each target, the n-th of its sequence with a weight of 1 / n."""

    constant_coefficient: float | None = None

    def __call__(self, tokens: TargetTokens) -> ObjectiveResult:
        values = tokens.log_probabilities
        coefficients = -position_weights(tokens.lengths).to(values)
        return ObjectiveResult((coefficients.double() * values.double()).sum(), coefficients)


@dataclass(frozen=True)
class TwoPasses(Supervised):
    """``Supervised`` that does not say that its coefficient is constant."""

    @property
    def constant_coefficient(self) -> float | None:
        return None


def position_weights(lengths: Sequence[int]) -> Tensor:
    return torch.cat([1 / torch.arange(1, length + 1) for length in lengths])


def plain_loss(objective: Any, values: Tensor, lengths: Sequence[int]) -> Tensor:
    """The loss of ``objective`` as a function that autograd differentiates. ``values``: the
    targets' log-probabilities (M,); ``lengths``: targets of each sequence.
    """
    if isinstance(objective, Sequences):
        sums = torch.stack([piece.sum() for piece in values.split(tuple(lengths))])
        return -torch.nn.functional.logsigmoid(BETA * sums).sum()
    if isinstance(objective, Weighted):
        return -(position_weights(lengths).to(values) * values).sum()
    return -values.sum()
