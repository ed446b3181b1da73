"""The protocol of an objective.

    hidden ── head, chunk by chunk ──> log p of each target ── objective ──> loss sum
                                                                  └───────> d loss / d log p
    hidden <── head's second pass, chunk by chunk <── one coefficient a target ──┘

The head makes the log-probabilities; an objective maps them to a loss and to one coefficient a
target; the head turns the coefficients into the gradient of the hidden states. An objective whose
coefficients are all -1 (cross entropy) needs one pass, for its gradient is known at once.

To add one: a frozen dataclass in a file of its own here, and a test against autograd over full
logits in ``tests/objective/``. ``StrategySpec.objective`` carries it to the head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetLogProbs:
    """The targets of one micro-batch, in the order of its tokens."""

    log_probs: Tensor  # fp32 (M,): log p(target), nats
    positions: Tensor  # int64 (M,): the token whose next token the target is, of the N tokens
    lengths: tuple[int, ...]  # tokens of each document of the micro-batch; they sum to N

    def documents(self) -> Tensor:
        """The document of each target: int64 (M,), counted from 0."""
        ends = torch.tensor(self.lengths, device=self.positions.device).cumsum(0)
        return torch.searchsorted(ends, self.positions, right=True)


class Objective(Protocol):
    """A loss over token log-probabilities. Instances are immutable and hashable."""

    @property
    def one_pass(self) -> bool:
        """Whether the loss is -log p summed over the targets, so that each coefficient is -1."""
        ...

    def loss_and_coefficients(self, targets: TargetLogProbs) -> tuple[Tensor, Tensor]:
        """The loss sum, an fp64 scalar, and d loss / d log p(target), fp32 (M,)."""
        ...
