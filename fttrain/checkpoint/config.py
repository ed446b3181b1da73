"""Settings of snapshots."""

from dataclasses import dataclass

from fttrain.util.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """The interval of snapshots, and the number of them that stay."""

    every: int = 100  # optimizer steps between snapshots; 0: only at the end (and on a signal)
    keep_last: int = 2  # whole snapshots that stay; the newest always does

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(
                f"checkpoint.every={self.every}: must be 0 (only at the end) or a number of steps"
            )
        if self.keep_last < 1:
            raise UserError(f"checkpoint.keep_last={self.keep_last}: must be at least 1")
