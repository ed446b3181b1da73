"""Settings of the schedule."""

from dataclasses import dataclass

from fttrain.util.errors import UserError

KINDS = ("grouped", "one_f_one_b")


@dataclass(frozen=True)
class ScheduleConfig:
    """In which order layers and micro-batches run."""

    # grouped: micro-batches that pass a layer together: 1 | N | "all" (those of the step)
    group: str | int = "all"
    kind: str = "grouped"  # grouped | one_f_one_b (strategy=pipeline)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"schedule.kind={self.kind}: {' or '.join(KINDS)}")
        if self.group != "all" and (isinstance(self.group, str) or self.group < 1):
            raise UserError(f"schedule.group={self.group}: all, or a whole number of 1 or more")
        if self.kind != "grouped" and self.group != "all":
            raise UserError(
                f"schedule.group={self.group}: {self.kind} passes micro-batches one by one and has "
                "no groups; leave it out, or choose a strategy with schedule=grouped"
            )

    def size(self, micro_batches: int) -> int:
        """G for a step of so many micro-batches on this rank."""
        return micro_batches if isinstance(self.group, str) else min(self.group, micro_batches)
