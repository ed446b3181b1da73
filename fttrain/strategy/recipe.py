"""What a native strategy is told, before anything is loaded."""

from dataclasses import dataclass
from typing import Any

import torch

from fttrain.checkpoint.frozen_cache import FrozenConfig
from fttrain.dist import Group
from fttrain.errors import UserError
from fttrain.model.decoder import Architecture
from fttrain.model.lora import LoraConfig
from fttrain.optim.factory import OptimConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.quant.scheme import QuantConfig
from fttrain.schedule import ScheduleConfig
from fttrain.store.hostpool import HostPool
from fttrain.strategy.protocol import SCHEDULES, StrategyConfig


@dataclass(frozen=True)
class Placement:
    """Where a step keeps what is not the frozen layers."""

    activations: str = "recompute"  # what a layer keeps for backward: its input only | keep: all
    boundaries: str = "device"  # the inputs of layers until their backward: device | host
    embedding: str = "device"  # the table: device | host
    head: str = "resident"  # on the device: resident | streamed: brought for each use

    def __post_init__(self) -> None:
        for key, allowed in (
            ("activations", ("recompute", "keep")),
            ("boundaries", ("device", "host")),
            ("embedding", ("device", "host")),
            ("head", ("resident", "streamed")),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise UserError(f"{key}={value}: {' or '.join(allowed)}")
        if self.boundaries == "host" and self.activations == "keep":
            raise UserError(
                "boundaries=host: with activations=keep backward reads them on the device; "
                "activations=recompute goes with it"
            )


@dataclass(frozen=True)
class StepSize:
    """The most that one optimizer step passes on a rank."""

    micro_batch_size: int = 1  # rows
    seq_len: int = 1  # tokens of a row
    gradient_accumulation_steps: int = 1  # micro-batches

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch_size * self.seq_len


@dataclass(frozen=True)
class Recipe:
    """Everything a native strategy is made of."""

    strategy: StrategyConfig
    quant: QuantConfig
    lora: LoraConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    placement: Placement
    frozen: FrozenConfig
    size: StepSize
    dtype: str
    seed: int


def check_pair(strategy: StrategyConfig, schedule: ScheduleConfig) -> None:
    """Raises UserError where they do not go together."""
    wanted = SCHEDULES[strategy.name]
    if schedule.kind != wanted:
        raise UserError(
            f"strategy={strategy.name} with schedule={schedule.kind}: they do not go together; "
            f"write schedule={wanted}"
        )


@dataclass(frozen=True)
class Plan:
    """A recipe for one model on these ranks: what a strategy's page books and builds from."""

    recipe: Recipe
    group: Group
    architecture: Architecture
    frozen_format: FrozenFormat
    pool: HostPool

    @property
    def dtype(self) -> torch.dtype:
        found: Any = getattr(torch, self.recipe.dtype)
        return found

    @property
    def layer_bytes(self) -> int:
        return self.frozen_format.layout.size_bytes

    @property
    def table_bytes(self) -> int:
        """Of the embedding, or of the head (V, C)."""
        a = self.architecture
        return int(a.config.vocab_size) * a.hidden * self.dtype.itemsize
