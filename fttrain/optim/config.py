"""Settings of the optimizer."""

import importlib.util
from dataclasses import dataclass

from fttrain.util.errors import UserError

KINDS = ("adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "deepspeed_cpu_adam")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    # Over fp32 masters. adamw: fp32 moments | adamw8bit, paged_adamw8bit, lion8bit: bitsandbytes'
    # 8-bit moments; paged: the driver moves them to the host where the card is full |
    # deepspeed_cpu_adam: fp32 moments, DeepSpeed's kernel for the host
    kind: str = "adamw"
    lr: float = 2e-4  # learning rate after warm-up
    # decay of the first and second moment, each in [0, 1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled, per step, times lr
    # lr of every B, and of DoRA's magnitudes, over that of every A (LoRA+, Hayou et al. 2024)
    loraplus_lr_ratio: float = 1.0
    max_grad_norm: float = 1.0  # clip the global gradient norm; 0: no clipping
    lr_schedule: str = "cosine"  # after warm-up: constant | linear | cosine
    warmup_ratio: float = 0.03  # fraction of all steps, in [0, 1)
    min_lr_ratio: float = 0.0  # lr at the end, as a fraction of lr, in [0, 1]
    offload: bool = False  # masters, moments and gradients in host memory, updated by the CPU
    # each rank has masters and moments of its shard alone and receives the other ranks' weights
    shard: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"optim.kind={self.kind}: {', '.join(KINDS)}")
        if self.offload and self.kind.startswith("paged"):
            raise UserError(
                f"optim.kind={self.kind} with optim.offload=true: both take the moments off the "
                "card; write adamw8bit, or offload=false"
            )
        if self.kind == "deepspeed_cpu_adam":
            self._check_deepspeed()
        if not 0 < self.loraplus_lr_ratio < float("inf"):
            raise UserError(f"optim.loraplus_lr_ratio={self.loraplus_lr_ratio}: a number above 0")
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

    def _check_deepspeed(self) -> None:
        if not self.offload:
            raise UserError(
                "optim.kind=deepspeed_cpu_adam with optim.offload=false: it works in host memory "
                "only; write optim.offload=true, or optim=adamw"
            )
        if importlib.util.find_spec("deepspeed") is None:  # without importing it
            raise UserError(
                "optim.kind=deepspeed_cpu_adam: DeepSpeed is not installed, which "
                "pip install --no-build-isolation 'fttrain[deepspeed]' does; optim=adamw with "
                "optim.offload=true needs none"
            )
