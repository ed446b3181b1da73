"""Builds the optimizer and the learning-rate schedule."""

from dataclasses import dataclass

from fttrain.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    kind: str = "adamw"  # adamw: fp32 masters and moments
    lr: float = 2e-4  # learning rate after warm-up
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the first and second moment, each in [0, 1)
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled, per step, times lr
    max_grad_norm: float = 1.0  # clip the global gradient norm; 0: no clipping
    lr_schedule: str = "cosine"  # after warm-up: constant | linear | cosine
    warmup_ratio: float = 0.03  # fraction of all steps, in [0, 1)
    min_lr_ratio: float = 0.0  # lr at the end, as a fraction of lr, in [0, 1]

    def __post_init__(self) -> None:
        if self.kind != "adamw":
            raise UserError(f"optim.kind={self.kind}: adamw")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"optim.lr={self.lr}: a number above 0, such as 2e-4")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={list(self.betas)}: two numbers in [0, 1)")
        for key in ("eps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise UserError(f"optim.{key}={getattr(self, key)}: a number of 0 or more")
        if self.lr_schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"optim.lr_schedule={self.lr_schedule}: constant, linear or cosine")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"optim.warmup_ratio={self.warmup_ratio}: a fraction in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optim.min_lr_ratio={self.min_lr_ratio}: a fraction in [0, 1]")
