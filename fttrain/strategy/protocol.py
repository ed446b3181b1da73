"""What a strategy is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.errors import UserError
from fttrain.strategy.sync import SyncStats

STRATEGIES = ("replicate",)
PLANNED = ("shard", "stream", "pipeline", "deepspeed", "auto")


@dataclass(frozen=True)
class StrategyConfig:
    """How the work is divided among the ranks."""

    name: str = "replicate"  # replicate: the whole base on each rank

    def __post_init__(self) -> None:
        if self.name in PLANNED:
            raise UserError(
                f"strategy={self.name}: not available yet; available: {', '.join(STRATEGIES)}"
            )
        if self.name not in STRATEGIES:
            raise UserError(f"strategy={self.name}: {', '.join(STRATEGIES)}")


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, the same on every rank but for ``sync``."""

    loss: float  # nats per target token over all ranks; 0 where the step had no target
    targets: int  # tokens that were trained on, over all ranks
    tokens: int  # all tokens that passed the model, over all ranks; there is no padding among them
    grad_norm: float  # of the mean loss, before clipping
    updated: bool  # False: no target, a gradient that is not finite, or the judge said no
    sync: SyncStats = field(default_factory=SyncStats)  # this rank's gradient traffic


Judge = Callable[[float, float], bool]  # (loss, grad_norm) -> whether the update is made


class Strategy(Protocol):
    """Trains, evaluates and answers, wherever the frozen base lives."""

    def train_step(
        self, micro_batches: list[MicroBatch], step: int, lr: float, accept: Judge
    ) -> StepStats:
        """One optimizer step over this rank's ``micro_batches``.

        The gradient is that of the loss summed over the target tokens of all ranks, divided by
        their number.
        """
        ...

    def evaluate(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        """(loss sum in nats, target tokens) over the micro-batches of all ranks."""
        ...

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
    ) -> list[list[int]]:
        """Greedy continuations of ``prompts`` (token ids), without the stop token."""
        ...

    def adapter_state(self) -> dict[str, Tensor]:
        """fp32 masters by name: A (r, in) and B (out, r)."""
        ...

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Takes what ``adapter_state`` gave, on any rank count."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments and step counts by name."""
        ...

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Takes what ``optimizer_state`` gave."""
        ...
