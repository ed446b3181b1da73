"""Settings of the training loop."""

import math
from dataclasses import dataclass

from fttrain.util.errors import UserError

SPIKE_POLICIES = ("stop", "skip", "ignore")


@dataclass(frozen=True)
class LoopConfig:
    """The length of a run, the sizes of its steps, and its reaction to trouble."""

    max_steps: int | None = None  # optimizer steps at most; None: as many as ``epochs`` gives
    epochs: float = 1.0  # passes over the training rows; fractions are fine
    micro_batch_size: int = 4  # rows of one forward and backward on one rank
    gradient_accumulation_steps: int = 4  # micro-batches of one rank in one optimizer step
    # where memory runs out in a step: True: halve the micro-batches and take it again | False: stop
    halve_on_oom: bool = True
    seed: int = 42  # orders the rows and seeds dropout and the adapter's first weights
    eval_every: int = 0  # steps between held-out evaluations; 0: only before and after
    log_every: int = 1  # steps between lines of metrics
    samples: int = 3  # held-out prompts answered before and after training
    z_loss: float = 0.0  # weight of each token's squared log-sum-exp in the loss
    spike_policy: str = "stop"  # after a loss spike: stop | skip | ignore
    spike_rise: float = 2.0  # nats over the running baseline that count as a spike

    def __post_init__(self) -> None:
        least = {
            "max_steps": 1,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "seed": 0,
            "eval_every": 0,
            "log_every": 1,
            "samples": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"loop.{name}={value}: must be at least {low}")
        for name in ("epochs", "spike_rise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"loop.{name}={value}: must be a number above 0")
        if not 0 <= self.z_loss < 1:
            raise UserError(f"loop.z_loss={self.z_loss}: a number in [0, 1), such as 1e-4")
        if self.spike_policy not in SPIKE_POLICIES:
            raise UserError(
                f"loop.spike_policy={self.spike_policy}: must be one of {', '.join(SPIKE_POLICIES)}"
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of optimizer steps of the whole run."""
        steps = max(1, round(self.epochs * steps_per_epoch))
        return min(steps, self.max_steps or steps)
