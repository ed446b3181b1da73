"""What this machine is."""

from dataclasses import dataclass

from fttrain.errors import UserError


@dataclass(frozen=True)
class RigConfig:
    """Where the ranks compute."""

    device: str = "auto"  # auto (a GPU a rank if there is one) | cpu | cuda
    threads: int | None = None  # CPU threads of a rank; None: cores / ranks of this machine

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"rig.device={self.device}: auto, cpu or cuda")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"rig.threads={self.threads}: a whole number of 1 or more, or null")
