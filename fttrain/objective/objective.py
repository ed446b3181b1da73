"""The protocol of an objective: the loss of a micro-batch, from its targets' log-probabilities.

To add one, write a class like ``supervised.Supervised`` in a file of its own here, and pass an
instance as ``StrategySpec.objective``. The head computes the gradient of the hidden states from the
objective's coefficients, so an objective never sees logits.

Legend: M target tokens of a micro-batch, S its sequences that have targets.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TargetTokens:
    """The target tokens of a micro-batch, sequence after sequence."""

    log_probabilities: Tensor  # fp32 (M,), natural logarithm
    lengths: tuple[int, ...]  # (S,): targets of each sequence, at least 1 each; they sum to M


@dataclass(frozen=True)
class ObjectiveResult:
    """The loss of a micro-batch and its derivative."""

    loss_sum: Tensor  # fp64 (), nats; the step divides it by the target tokens of all ranks
    coefficients: Tensor  # fp32 (M,): d loss_sum / d log-probability


class Objective(Protocol):
    """The loss that training minimises; a sum over micro-batches."""

    @property
    def constant_coefficient(self) -> float | None:
        """The derivative of the loss by each log-probability where it is one constant c, so that
        the loss is c times their sum: the head then makes one pass. None: it depends on the
        log-probabilities, and the head makes two.
        """
        ...

    def __call__(self, tokens: TargetTokens) -> ObjectiveResult:
        """The result for one micro-batch with M > 0; on the tensors' device, without waiting for
        it.
        """
        ...
