"""The optimizer over the flat fp32 masters of the layers' adapters."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
from bitsandbytes.optim.lion import Lion8bit
from torch import Tensor, nn

from fttrain.errors import UserError
from fttrain.optim.config import OptimConfig
from fttrain.optim.cpu_adam import CpuAdam

HALVES = ("a", "b")  # all A's of a layer, then all B's
BLOCK_VALUES = 256  # of 8-bit moments that share a scale
# Names in bitsandbytes' state that are constants, not state.
CONSTANTS = ("qmap1", "qmap2")


def moment_bytes(config: OptimConfig, values: int) -> int:
    """What the optimizer keeps for so many values beside them and their gradients."""
    if config.kind in ("adamw", "deepspeed_cpu_adam"):
        return 8 * values
    blocks = -(-values // BLOCK_VALUES)
    return (1 if config.kind == "lion8bit" else 2) * (values + 4 * blocks)


class Optimizer:
    """One flat fp32 parameter a layer, updated in place from its ``grad``.

    adamw is torch's fused AdamW (Loshchilov and Hutter 2019), deepspeed_cpu_adam DeepSpeed's (see
    ``cpu_adam``), the others are bitsandbytes' (Dettmers et al. 2022; Lion: Chen et al. 2023).
    """

    def __init__(
        self, flats: Iterable[tuple[nn.Parameter, int]], config: OptimConfig, first_layer: int = 0
    ) -> None:
        """``flats``: each layer's parameter, and how many of its values, the first ones, are A's;
        ``first_layer``: the place of the first one among the layers of the whole model.
        """
        flats = list(flats)
        self._flats = [flat for flat, _ in flats]
        self._first_layer = first_layer
        # Views of the flat masters; autograd never sees them.
        self._halves = [
            [nn.Parameter(part) for part in flat.data.split([count, flat.numel() - count])]
            for flat, count in flats
        ]
        self._ratios = (1.0, config.loraplus_lr_ratio)
        # One a layer: each can be stepped by itself, as soon as its gradient is there.
        self._optimizers = [
            _make([{"params": [half]} for half in halves], config) for halves in self._halves
        ]

    def step(self, layer: int, lr: float) -> None:
        """Update the parameter of ``layer``, a place among ``flats``, from its ``grad``; ``lr`` is
        that of the A's.
        """
        flat, halves, optimizer = self._flats[layer], self._halves[layer], self._optimizers[layer]
        assert flat.grad is not None
        grads = flat.grad.split([half.numel() for half in halves])
        for half, grad, group, ratio in zip(
            halves, grads, optimizer.param_groups, self._ratios, strict=True
        ):
            half.grad, group["lr"] = grad, lr * ratio
        optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """All a resumed run needs, by flat name: ``0.a.exp_avg`` is the first moment of layer 0's
        A's.
        """
        return {
            f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, half, optimizer, _ in self._named()
            for key, value in optimizer.state[half].items()
            if key not in CONSTANTS
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what ``state`` gave. Raises UserError where it is that of other parameters or of
        another optimizer.
        """
        for name, half, optimizer, group in self._named():
            prefix = f"{name}."
            own = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
            if own:
                _restore(_blank(optimizer, half, group), optimizer.state[half], name, own)
            elif state:
                raise UserError(
                    f"resume: the snapshot has no optimizer state of {name}; it belongs to another "
                    "model or another version"
                )

    def _named(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer, int]]:
        """(name, half, its optimizer, its group there) of every half."""
        for index, (halves, optimizer) in enumerate(
            zip(self._halves, self._optimizers, strict=True), self._first_layer
        ):
            for group, (half_name, half) in enumerate(zip(HALVES, halves, strict=True)):
                yield f"{index}.{half_name}", half, optimizer, group


def _restore(
    blank: dict[str, Any], state: dict[str, Any], name: str, own: dict[str, Tensor]
) -> None:
    """``own`` into the optimizer's ``state`` of one half, so far ``blank`` and constants."""
    if blank.keys() != own.keys():
        raise UserError(
            f"resume: the optimizer state of {name} has {', '.join(sorted(own))}, wanted are "
            f"{', '.join(sorted(blank))}; the snapshot belongs to another optim.kind"
        )
    for key, value in own.items():
        wanted = blank[key]
        if not isinstance(wanted, Tensor):
            state[key] = int(value)
        elif wanted.shape == value.shape:
            wanted.copy_(value)
        else:
            raise UserError(
                f"resume: the optimizer state of {name} has {value.numel()} values of {key}, "
                f"the adapter {wanted.numel()}; the snapshot belongs to other lora settings"
            )


def _make(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "lion8bit":
        return Lion8bit(groups, **settings)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, eps=config.eps, fused=True, **settings)
    if config.kind == "deepspeed_cpu_adam":
        return CpuAdam(groups, eps=config.eps, **settings)
    kind = PagedAdamW8bit if config.kind == "paged_adamw8bit" else AdamW8bit
    return kind(groups, eps=config.eps, **settings)


def _blank(optimizer: torch.optim.Optimizer, half: nn.Parameter, group: int) -> dict[str, Any]:
    """Of ``half``, alone in its ``group``: the state before its first step, in the optimizer."""
    state = optimizer.state[half]
    if isinstance(optimizer, torch.optim.AdamW):
        # The fused kernel wants the step count on the parameter's device, too.
        state["step"] = torch.zeros((), dtype=torch.float32, device=half.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(half), torch.zeros_like(half)
    elif isinstance(optimizer, CpuAdam):
        optimizer.init_state(half)
    else:
        optimizer.init_state(optimizer.param_groups[group], half, group, 0)  # type: ignore[attr-defined]
    return {key: value for key, value in state.items() if key not in CONSTANTS}
