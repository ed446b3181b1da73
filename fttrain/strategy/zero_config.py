"""Settings of strategy=deepspeed."""

from dataclasses import dataclass

from fttrain.util.errors import UserError

DEEPSPEED = "deepspeed"
DEFAULT_STAGE = 2


@dataclass(frozen=True)
class ZeroConfig:
    """ZeRO's division among the ranks, and its offload to host memory.

    null: as the launcher's accelerate file or ``config`` says; otherwise stage 2 without offload.
    """

    # 1: optimizer state | 2: gradients, too | 3: weights, too, gathered before use
    stage: int | None = None
    offload_optimizer: bool | None = None  # fp32 masters and moments in host memory
    offload_params: bool | None = None  # stage 3: this rank's shard of the weights in host memory
    config: str | None = None  # the user's DeepSpeed JSON; its "auto" values are filled

    def __post_init__(self) -> None:
        if self.stage not in (None, 1, 2, 3):
            raise UserError(f"strategy.zero.stage={self.stage}: 1, 2 or 3")
        if self.config == "":
            raise UserError("strategy.zero.config is empty: the path of a DeepSpeed JSON, or null")

    @property
    def is_default(self) -> bool:
        return self == ZeroConfig()
