"""The settings that a strategy is built from.

Loads no torch: a configuration makes a ``StrategySpec`` to check its settings.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fttrain.data.config import ROW_MULTIPLE
from fttrain.frozen.config import FrozenConfig
from fttrain.model.config import AUTO_KERNELS, LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.quant.config import QuantConfig
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import (
    Placement,
    StrategyConfig,
    check_kernels,
    check_together,
    check_trained,
)
from fttrain.util.units import round_up

if TYPE_CHECKING:  # its module loads torch
    from fttrain.objective.objective import Objective


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
    """The settings of a strategy. Raises UserError where they do not go together."""

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
    objective: "Objective | None" = None  # the loss that is minimised; None: ``Supervised``

    def __post_init__(self) -> None:
        check_together(self.strategy, self.schedule, self.optim)
        check_kernels(self.kernels, self.strategy)
        check_trained(
            self.strategy, self.quant, self.lora, self.optim, self.schedule, self.placement
        )
