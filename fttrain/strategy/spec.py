"""What a native strategy is told, before anything is loaded."""

from dataclasses import dataclass
from typing import Any

import torch

from fttrain.data.batch import ROW_MULTIPLE
from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.config import FrozenConfig
from fttrain.memory.ledger import MemoryLedger
from fttrain.model.config import AUTO_KERNELS, LoraConfig
from fttrain.model.decoder import Architecture
from fttrain.optim.config import OptimConfig
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import Placement, StrategyConfig
from fttrain.util.units import round_up


@dataclass(frozen=True)
class StepSize:
    """The most that one optimizer step passes on a rank."""

    micro_batch_size: int = 1  # rows
    seq_len: int = 1  # tokens of a row
    gradient_accumulation_steps: int = 1  # micro-batches
    target_share: float = 1.0  # of the tokens, those that are trained on; plans alone ask
    row_documents: int = 1  # the most that are packed into a row; plans alone ask

    @property
    def row_tokens(self) -> int:
        """What is reckoned for each row of a micro-batch: so much that the parts it may be divided
        into (``Strategy.divide``) fit where it did, each with padding of its own.
        """
        return round_up(self.seq_len, ROW_MULTIPLE)

    @property
    def micro_batch_tokens(self) -> int:
        """The most tokens of a micro-batch, padding included."""
        return self.micro_batch_size * self.row_tokens


@dataclass(frozen=True)
class StrategySpec:
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
    z_loss: float = 0.0  # as Head
    kernels: str = AUTO_KERNELS  # one of KERNELS


@dataclass(frozen=True)
class BuildContext:
    """A recipe for one model on these ranks: what a strategy's page books and builds from."""

    spec: StrategySpec
    group: RankGroup
    architecture: Architecture
    frozen_format: FrozenFormat
    ledger: MemoryLedger

    @property
    def dtype(self) -> torch.dtype:
        found: Any = getattr(torch, self.spec.dtype)
        return found

    @property
    def layer_bytes(self) -> int:
        return self.frozen_format.layout.size_bytes

    @property
    def table_bytes(self) -> int:
        """Of the embedding, or of the head (V, C)."""
        a = self.architecture
        return int(a.config.vocab_size) * a.hidden * self.dtype.itemsize
