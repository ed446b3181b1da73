"""grouped(G): G micro-batches pass a layer together."""

from dataclasses import dataclass

from fttrain.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """In which order layers and micro-batches run."""

    group: str | int = "all"  # micro-batches that pass a layer together: 1 | N | "all" (those of the step)

    def __post_init__(self) -> None:
        if self.group != "all" and (isinstance(self.group, str) or self.group < 1):
            raise UserError(f"schedule.group={self.group}: all, or a whole number of 1 or more")
