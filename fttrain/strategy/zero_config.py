"""The settings of strategy=deepspeed, and what of the other settings it cannot honour."""

from dataclasses import dataclass

from fttrain.util.errors import UserError

DEEPSPEED = "deepspeed"
DEFAULT_STAGE = 2


@dataclass(frozen=True)
class ZeroConfig:
    """What DeepSpeed's ZeRO divides among the ranks, and what of it waits in host memory.

    null: as the launcher's accelerate file or ``config`` says; else stage 2, and no offload.
    """

    # 1: optimizer state | 2: gradients, too | 3: weights, too, gathered before use
    stage: int | None = None
    offload_optimizer: bool | None = None  # fp32 masters and moments in host memory
    offload_params: bool | None = None  # stage 3: this rank's part of the weights in host memory
    config: str | None = None  # a DeepSpeed JSON of the user's own; its "auto" values are filled

    def __post_init__(self) -> None:
        if self.stage not in (None, 1, 2, 3):
            raise UserError(f"strategy.zero.stage={self.stage}: 1, 2 or 3")
        if self.config == "":
            raise UserError("strategy.zero.config is empty: the path of a DeepSpeed JSON, or null")

    @property
    def is_default(self) -> bool:
        return self == ZeroConfig()
