"""What a strategy is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.errors import UserError
from fttrain.store import Traffic
from fttrain.store.hostpool import Booking
from fttrain.strategy.sync import SyncStats
from fttrain.strategy.update import UpdateStats
from fttrain.strategy.zero.config import DEEPSPEED, ZeroConfig

# native strategy -> the schedule it runs with; every other pair is refused by name.
SCHEDULES = {
    "replicate": "grouped",
    "shard": "grouped",
    "stream": "grouped",
    "pipeline": "one_f_one_b",
}
AUTO = "auto"  # the planner chooses, before anything is built; no strategy of its own
NAMES = (*SCHEDULES, DEEPSPEED, AUTO)


@dataclass(frozen=True)
class StrategyConfig:
    """How the frozen base is divided among the ranks."""

    # replicate: whole on each rank | shard: a part of each layer on each rank, gathered before use
    # | stream: in host memory, copied before use | pipeline: some layers on each rank
    # | deepspeed: as ZeRO divides it, by DeepSpeed and transformers' own model
    # | auto: the fastest native one that fits, with its schedule and split of a step's rows
    name: str = "replicate"
    # stream: layers that stay on the device: a number | all | a list with a number for each rank
    resident_layers: int | str | tuple[int, ...] = 0
    slots: int = 2  # stream: layers on the device beside the resident ones: 2 or 3
    zero: ZeroConfig = field(default_factory=ZeroConfig)  # of deepspeed

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"strategy={self.name}: {', '.join(NAMES)}")
        if self.name != DEEPSPEED and not self.zero.is_default:
            raise UserError(
                f"strategy={self.name}: strategy.zero.* belongs to strategy={DEEPSPEED}"
            )
        if self.name != "stream" and (self.resident_layers, self.slots) != (0, 2):
            raise UserError(
                f"strategy={self.name}: strategy.resident_layers and strategy.slots belong to "
                "strategy=stream"
            )
        if self.slots not in (2, 3):
            raise UserError(f"strategy.slots={self.slots}: 2 or 3")
        kept = self.resident_layers
        numbers = (kept,) if isinstance(kept, int) else kept
        if kept != "all" and (isinstance(numbers, str) or min(numbers, default=-1) < 0):
            raise UserError(
                f"strategy.resident_layers={kept}: a number of 0 or more, all, or a list with one "
                "for each rank of a machine"
            )

    def resident(self, rank: int, world_size: int, layers: int) -> int:
        """Layers of ``layers`` that stay on the device of ``rank``, one of ``world_size`` of a
        machine.

        Raises UserError for more than there are, or a list that does not name every rank.
        """
        kept = self.resident_layers
        if isinstance(kept, str):
            return layers
        if isinstance(kept, tuple) and len(kept) != world_size:
            raise UserError(
                f"strategy.resident_layers={list(kept)}: a number for each of {world_size} rank(s) "
                "of a machine"
            )
        own = kept if isinstance(kept, int) else kept[rank]
        if own > layers:
            raise UserError(
                f"strategy.resident_layers={own}: the model has {layers} layers; all keeps them all"
            )
        return own


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, the same on every rank but for ``sync``, ``traffic`` and
    ``update``."""

    loss: float  # nats per target token over all ranks; 0 where the step had no target
    targets: int  # tokens that were trained on, over all ranks
    tokens: int  # all tokens that passed the model, over all ranks; there is no padding among them
    grad_norm: float  # of the mean loss, before clipping
    updated: bool  # False: no target, a gradient that is not finite, or the judge said no
    sync: SyncStats = field(default_factory=SyncStats)  # this rank's gradient traffic
    traffic: Traffic = field(default_factory=Traffic)  # what this rank's layers made it move
    update: UpdateStats = field(default_factory=UpdateStats)  # this rank's, of the step before


class OutOfMemory(UserError):
    """Memory ran out on some rank in a step; raised on all of them. Nothing was updated, and the
    step can be taken again with smaller micro-batches.
    """

    def __init__(self, what: str, helps: str) -> None:
        super().__init__(f"{what}; {helps}")
        self.what = what  # the rank and its largest parts


Judge = Callable[[float, float], bool]  # (loss, grad_norm) -> whether the update is made


class Strategy(Protocol):
    """Trains, evaluates, answers, wherever the frozen base lives. Every rank makes every call."""

    @property
    def data_parallel(self) -> tuple[int, int]:
        """(this rank's place, number of places) among which the micro-batches are divided."""
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

    def divide(self, pieces: int) -> None:
        """Micro-batches have 1 / ``pieces`` of the rows from here on, and a step as many times more
        of them.
        """
        ...

    def evaluate(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        """(loss sum in nats, target tokens) over the micro-batches of all ranks."""
        ...

    @property
    def bookings(self) -> Sequence[Booking]:
        """What this rank takes of the memory of its device and of the host, part by part."""
        ...

    @property
    def pass_s(self) -> float:
        """Seconds that the last pass over the layers took in ``evaluate``; 0 before it."""
        ...

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
    ) -> list[list[int]]:
        """Greedy continuations of ``prompts`` (token ids), without the stop token."""
        ...

    def adapter_state(self) -> dict[str, Tensor]:
        """fp32 masters by name: A (r, in), B (out, r), with DoRA magnitudes (out,). Whole on rank
        0; others may get less.
        """
        ...

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Takes what ``adapter_state`` gave, under any strategy and rank count."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments and step counts by name. Whole on rank 0; others may get less."""
        ...

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Takes what ``optimizer_state`` gave, under any strategy and rank count."""
        ...
