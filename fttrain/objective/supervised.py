"""Supervised fine-tuning: cross entropy, -log p(target) summed over the targets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.objective.objective import TargetLogProbs


@dataclass(frozen=True)
class Supervised:
    """Cross entropy in nats. Dividing by the number of targets is the optimizer step's part."""

    one_pass: bool = True

    def loss_and_coefficients(self, targets: TargetLogProbs) -> tuple[Tensor, Tensor]:
        """The loss sum, an fp64 scalar, and -1 for each target, fp32 (M,)."""
        loss = -targets.log_probs.sum(dtype=torch.float64)
        return loss, torch.full_like(targets.log_probs, -1.0)


SUPERVISED = Supervised()
