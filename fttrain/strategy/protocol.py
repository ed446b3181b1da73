"""What a strategy is."""

from dataclasses import dataclass

from fttrain.errors import UserError

STRATEGIES = ("replicate",)
PLANNED = ("shard", "stream", "pipeline", "deepspeed", "auto")


@dataclass(frozen=True)
class StrategyConfig:
    """How the work is divided among the ranks."""

    name: str = "replicate"  # replicate: the whole base on each rank

    def __post_init__(self) -> None:
        if self.name in PLANNED:
            raise UserError(f"strategy={self.name}: not available yet; available: {', '.join(STRATEGIES)}")
        if self.name not in STRATEGIES:
            raise UserError(f"strategy={self.name}: {', '.join(STRATEGIES)}")
