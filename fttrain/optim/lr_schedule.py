"""The learning rate of each optimizer step."""

import math

from fttrain.optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) of ``total_steps``.

    Linear warm-up over ``warmup_ratio`` of the steps (above 0 from the first step on), then the
    decay that ``lr_schedule`` names. It reaches ``min_lr_ratio`` one step after the last.
    """
    warmup_steps = round(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    if config.lr_schedule == "constant":
        return config.lr
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * decay[config.lr_schedule])
