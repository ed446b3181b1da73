"""Builds the optimizer and the learning-rate schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fttrain.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    kind: str = "adamw"  # adamw: fp32 masters and moments
    lr: float = 2e-4  # learning rate after warm-up
    # decay of the first and second moment, each in [0, 1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled, per step, times lr
    max_grad_norm: float = 1.0  # clip the global gradient norm; 0: no clipping
    lr_schedule: str = "cosine"  # after warm-up: constant | linear | cosine
    warmup_ratio: float = 0.03  # fraction of all steps, in [0, 1)
    min_lr_ratio: float = 0.0  # lr at the end, as a fraction of lr, in [0, 1]
    offload: bool = False  # masters, moments and gradients in host memory, updated by the CPU

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


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) of ``total_steps``.

    Linear warm-up over ``warmup_ratio`` of the steps (the first step already moves), then the
    chosen decay, which reaches ``min_lr_ratio`` one step after the last.
    """
    warmup_steps = round(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    falling = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    if config.lr_schedule == "constant":
        return config.lr
    return config.lr * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * falling[config.lr_schedule]
    )


class Optimizer:
    """torch's fused AdamW (Loshchilov and Hutter 2019) over one flat fp32 parameter a layer."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimConfig, first_layer: int = 0
    ) -> None:
        """``first_layer``: the place of the first parameter among the layers of the whole model."""
        self._parameters = list(parameters)
        self._first_layer = first_layer
        self._adamw = torch.optim.AdamW(
            self._parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, lr: float) -> None:
        """Update every parameter from its ``grad``."""
        for param_group in self._adamw.param_groups:
            param_group["lr"] = lr
        self._adamw.step()

    def state(self) -> dict[str, Tensor]:
        """All a resumed run needs, by flat name: ``0.exp_avg``, fp32, is layer 0's first moment."""
        return {
            f"{index}.{name}": value
            for index, parameter in enumerate(self._parameters, self._first_layer)
            for name, value in self._adamw.state[parameter].items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what ``state`` gave. Raises UserError where it belongs to other parameters."""
        for index, parameter in enumerate(self._parameters, self._first_layer):
            own = {
                name.removeprefix(f"{index}."): value
                for name, value in state.items()
                if name.startswith(f"{index}.")
            }
            if own and own["exp_avg"].shape != parameter.shape:
                raise UserError(
                    f"resume: the optimizer state of layer {index} has {own['exp_avg'].numel()} "
                    "values, "
                    f"the adapter {parameter.numel()}; the snapshot belongs to other lora settings"
                )
            if own:
                # The fused kernel wants the step count on the parameter's device, too.
                self._adamw.state[parameter] = {
                    name: value.to(parameter.device) for name, value in own.items()
                }
