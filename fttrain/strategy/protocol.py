"""The protocol of strategies, and the results of a step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.memory.ledger import Reservation
from fttrain.store import Traffic
from fttrain.strategy.grad_reduce import SyncStats
from fttrain.strategy.optimizer_step import UpdateStats
from fttrain.util.errors import UserError


@dataclass(frozen=True)
class StepStats:
    """Figures of one optimizer step, the same on every rank but for ``sync``, ``traffic`` and
    ``update``.
    """

    loss: float  # nats per target token over all ranks; 0 where the step had no target
    targets: int  # tokens that were trained on, over all ranks
    tokens: int  # tokens that passed the model, without padding, over all ranks
    grad_norm: float  # of the mean loss, before clipping
    updated: bool  # False: no target, a gradient that is not finite, or refused by the judge
    sync: SyncStats = field(default_factory=SyncStats)  # this rank's gradient traffic
    traffic: Traffic = field(default_factory=Traffic)  # this rank's traffic for its layers
    update: UpdateStats = field(default_factory=UpdateStats)  # this rank's last complete update


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over the target tokens of all ranks, the same on every rank."""

    targets: int  # target tokens
    metrics: Mapping[str, float]  # by name, as METRICS: nll in nats

    def mean(self, metric: str) -> float:
        """``metric`` per target token; 0 without targets."""
        return self.metrics[metric] / max(1, self.targets)


class OutOfMemory(UserError):
    """Memory ran out on some rank in a step or an evaluation; raised on all ranks. Nothing was
    updated, and the step can be repeated with smaller micro-batches.
    """

    def __init__(self, what: str, helps: str) -> None:
        super().__init__(f"{what}; {helps}")
        self.what = what  # the rank and its largest parts

    def pieces(self, micro_batch_size: int, halve: bool) -> int:
        """The number of pieces into which a micro-batch of so many rows is divided before the step
        is repeated: the smallest divisor above 1, which is 2 for an even number.

        Raises this error for one row, and without ``halve``.
        """
        if micro_batch_size == 1 or not halve:
            raise self
        return next(n for n in range(2, micro_batch_size + 1) if micro_batch_size % n == 0)


Judge = Callable[[float, float], bool]  # (loss, grad_norm) -> whether the update is made


class Strategy(Protocol):
    """Training, evaluation and generation over a placement of the frozen base. All methods are
    collective calls.
    """

    @property
    def data_parallel(self) -> tuple[int, int]:
        """(this rank's index, world size) of the data parallelism: the micro-batches are divided
        among so many.
        """
        ...

    def train_step(
        self, micro_batches: list[MicroBatch], step: int, lr: float, accept: Judge
    ) -> StepStats:
        """One optimizer step over this rank's ``micro_batches``, in host memory.

        The gradient is that of the loss summed over the target tokens of all ranks, divided by
        their number. Raises, before the update, UserError where the frozen base is damaged and
        OutOfMemory where memory does not suffice.
        """
        ...

    def resize(self, pieces: int) -> None:
        """Prepare for micro-batches with 1 / ``pieces`` of the rows, and a step of as many times
        more of them.
        """
        ...

    def evaluate(self, micro_batches: list[MicroBatch]) -> EvaluationSums:
        """Evaluate the micro-batches of all ranks. Raises as ``train_step``."""
        ...

    @property
    def reservations(self) -> Sequence[Reservation]:
        """The reserved memory of this rank on its device and on the host, part by part."""
        ...

    @property
    def pass_s(self) -> float:
        """Seconds of a pass over the layers in the last ``evaluate``; 0 before it."""
        ...

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
    ) -> list[list[int]]:
        """Greedy continuations of ``prompts`` (token ids), without the stop token."""
        ...

    def adapter_state(self) -> dict[str, Tensor]:
        """The fp32 masters by name: A (r, in), B (out, r), with DoRA magnitudes (out,). Whole on
        rank 0; others may get less.
        """
        ...

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Load the result of ``adapter_state``, of any strategy and world size."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments and step counts by name. Whole on rank 0; others may get less."""
        ...

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Load the result of ``optimizer_state``, of any strategy and world size."""
        ...
