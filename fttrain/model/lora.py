"""Low-rank adapters: names and defaults are PEFT's."""

from dataclasses import dataclass

from fttrain.errors import UserError


@dataclass(frozen=True)
class LoraConfig:
    """What is trained: y = W x + scale * B A x, with scale = lora_alpha / r (rsLoRA: / sqrt(r))."""

    r: int = 16  # rank of A (r, in_features) and B (out_features, r)
    lora_alpha: float = 32.0  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # probability that an input of A is zeroed in training, in [0, 1)
    target_modules: str | tuple[str, ...] = "all-linear"  # "all-linear" or names such as q_proj
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora.r={self.r}: a whole number of 1 or more")
        if not self.lora_alpha > 0:
            raise UserError(f"lora.lora_alpha={self.lora_alpha}: a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora.lora_dropout={self.lora_dropout}: a probability in [0, 1)")
        if not self.target_modules:
            raise UserError("lora.target_modules is empty: all-linear or a list such as [q_proj,v_proj]")
