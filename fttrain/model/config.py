"""The settings of adapters and kernels, and the granularity of MLP tiles."""

import math
from dataclasses import dataclass

from fttrain.util.errors import UserError

# Kernels of norms, rotary embedding and SwiGLU. auto: Liger's Triton kernels on a GPU where they
# run, else plain torch; torch: plain torch; liger: Liger's, or an error
KERNELS = AUTO_KERNELS, TORCH_KERNELS, LIGER_KERNELS = "auto", "torch", "liger"
MASK_TOKENS = 1024  # tokens of a dropout mask that one seed draws; tiles hold whole blocks of it


@dataclass(frozen=True)
class LoraConfig:
    """The adapters: their linears, their rank and their kind."""

    r: int = 16  # rank of the adapters; 0: no adapter, all weights train (strategy=deepspeed)
    lora_alpha: float = 32.0  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # probability of zeroing an input of the adapter, in [0, 1)
    # all-linear, or names such as (q_proj, v_proj)
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)
    # DoRA: magnitudes, too. lora_dropout zeroes inputs of A alone; in PEFT those of the frozen
    # weight as well, which takes another GEMM
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 0:
            raise UserError(
                f"lora.r={self.r}: a whole number of at least 1 is allowed; 0 trains all weights"
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora.lora_dropout={self.lora_dropout}: a number in [0, 1) is allowed")
        if self.lora_alpha <= 0:
            raise UserError(f"lora.lora_alpha={self.lora_alpha}: a number above 0 is allowed")
        if not self.target_modules:
            raise UserError(
                "lora.target_modules is empty: all-linear, or names such as [q_proj,v_proj] are "
                "allowed"
            )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            object.__setattr__(self, "target_modules", (self.target_modules,))
        for key in () if self.r else ("lora_dropout", "target_modules", "use_rslora", "use_dora"):
            value = getattr(self, key)
            if value not in (0.0, False, "all-linear"):
                raise UserError(f"lora.{key}={value} with lora.r=0: there is no adapter")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
