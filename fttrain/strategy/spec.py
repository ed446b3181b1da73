"""StrategySpec and BuildContext: the settings and the surroundings from which a strategy is
built.
"""

from dataclasses import dataclass

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
    """The largest optimizer step of a rank."""

    micro_batch_size: int = 1  # rows
    seq_len: int = 1  # tokens of a row
    gradient_accumulation_steps: int = 1  # micro-batches
    target_share: float = 1.0  # share of the tokens that are targets; read by plans alone
    row_documents: int = 1  # the most documents packed into a row; read by plans alone

    @property
    def row_tokens(self) -> int:
        """Tokens reserved for a row of a micro-batch. It is rounded up so that pieces of a
        micro-batch (``Strategy.resize``), each with its own padding, fit into the same memory.
        """
        return round_up(self.seq_len, ROW_MULTIPLE)

    @property
    def micro_batch_tokens(self) -> int:
        """The most tokens of a micro-batch, padding included."""
        return self.micro_batch_size * self.row_tokens


@dataclass(frozen=True)
class StrategySpec:
    """The settings from which a strategy is built."""

    strategy: StrategyConfig
    quant: QuantConfig
    lora: LoraConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    placement: Placement
    frozen: FrozenConfig
    size: StepSize
    dtype: str  # of the compute: bfloat16 | float32
    seed: int
    z_loss: float = 0.0  # weight of the z-loss, as in ``Head``
    kernels: str = AUTO_KERNELS  # one of KERNELS


@dataclass(frozen=True)
class BuildContext:
    """A spec for one model on these ranks, from which a strategy's page reserves and builds."""

    spec: StrategySpec
    group: RankGroup
    architecture: Architecture
    frozen_format: FrozenFormat
    ledger: MemoryLedger

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        return dtype

    @property
    def layer_bytes(self) -> int:
        return self.frozen_format.layout.size_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the embedding's table or of the head (V, C)."""
        a = self.architecture
        return int(a.config.vocab_size) * a.hidden * self.dtype.itemsize
