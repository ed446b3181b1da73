"""Settings of the schedule."""

from dataclasses import dataclass

from fttrain.util.errors import UserError

KINDS = ("grouped", "one_f_one_b")


@dataclass(frozen=True)
class ScheduleConfig:
    """The order of layers and micro-batches."""

    # grouped: micro-batches that pass a layer together: 1 | N | "all" (those of the step)
    micro_batch_group: str | int = "all"
    kind: str = "grouped"  # grouped | one_f_one_b (strategy=pipeline)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"schedule.kind={self.kind}: {' or '.join(KINDS)}")
        if self.micro_batch_group != "all" and (
            isinstance(self.micro_batch_group, str) or self.micro_batch_group < 1
        ):
            raise UserError(
                f"schedule.micro_batch_group={self.micro_batch_group}: all, or a whole number of "
                "1 or more"
            )
        if self.kind != "grouped" and self.micro_batch_group != "all":
            raise UserError(
                f"schedule.micro_batch_group={self.micro_batch_group}: {self.kind} passes "
                "micro-batches one by one and has "
                "no groups; leave it out, or choose a strategy with schedule=grouped"
            )

    def size(self, micro_batches: int) -> int:
        """G for a step of ``micro_batches`` on this rank."""
        return (
            micro_batches
            if isinstance(self.micro_batch_group, str)
            else min(self.micro_batch_group, micro_batches)
        )
