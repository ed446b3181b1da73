"""The optimizer over the flat fp32 masters of the layers' adapters."""

from collections.abc import Iterable, Iterator
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from fttrain.errors import UserError
from fttrain.optim.config import OptimConfig

HALVES = ("a", "b")  # all A's of a layer, then all B's
BLOCK_VALUES = 256  # of 8-bit moments that share a scale
# Names in bitsandbytes' state that are constants, not state.
CONSTANTS = ("qmap1", "qmap2")


def moment_bytes(config: OptimConfig, values: int) -> int:
    """What the optimizer keeps for so many values beside them and their gradients."""
    if config.kind == "adamw":
        return 8 * values
    blocks = -(-values // BLOCK_VALUES)
    return (1 if config.kind == "lion8bit" else 2) * (values + 4 * blocks)


class Optimizer:
    """One flat fp32 parameter a layer, updated in place from its ``grad``.

    adamw is torch's fused AdamW (Loshchilov and Hutter 2019), the others are bitsandbytes'
    (Dettmers et al. 2022; Lion: Chen et al. 2023).
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
            tuple(nn.Parameter(part) for part in flat.data.split([count, flat.numel() - count]))
            for flat, count in flats
        ]
        self._ratios = (1.0, config.loraplus_lr_ratio)
        groups = [{"params": [halves[i] for halves in self._halves]} for i in range(len(HALVES))]
        self._optimizer = _make(groups, config)

    def step(self, lr: float) -> None:
        """Update every parameter from its ``grad``; ``lr`` is that of the A's."""
        for flat, halves in zip(self._flats, self._halves, strict=True):
            assert flat.grad is not None
            sizes = [half.numel() for half in halves]
            for half, grad in zip(halves, flat.grad.split(sizes), strict=True):
                half.grad = grad
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = lr * ratio
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """All a resumed run needs, by flat name: ``0.a.exp_avg`` is the first moment of layer 0's
        A's.
        """
        return {
            f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, half in self._named()
            for key, value in self._optimizer.state[half].items()
            if key not in CONSTANTS
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what ``state`` gave. Raises UserError where it is that of other parameters or of
        another optimizer.
        """
        for place, (name, half) in enumerate(self._named()):
            prefix = f"{name}."
            own = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
            if own:
                self._restore(place, name, half, own)
            elif state:
                raise UserError(
                    f"resume: the snapshot has no optimizer state of {name}; it belongs to another "
                    "model or another version"
                )

    def _restore(self, place: int, name: str, half: nn.Parameter, own: dict[str, Tensor]) -> None:
        blank = _blank(self._optimizer, half, place)
        if blank.keys() != own.keys():
            raise UserError(
                f"resume: the optimizer state of {name} has {', '.join(sorted(own))}, wanted are "
                f"{', '.join(sorted(blank))}; the snapshot belongs to another optim.kind"
            )
        for key, value in own.items():
            wanted = blank[key]
            if not isinstance(wanted, Tensor):
                self._optimizer.state[half][key] = int(value)
            elif wanted.shape == value.shape:
                wanted.copy_(value)
            else:
                raise UserError(
                    f"resume: the optimizer state of {name} has {value.numel()} values of {key}, "
                    f"the adapter {wanted.numel()}; the snapshot belongs to other lora settings"
                )

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for index, halves in enumerate(self._halves, self._first_layer):
            for half_name, half in zip(HALVES, halves, strict=True):
                yield f"{index}.{half_name}", half


def _make(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "lion8bit":
        return bitsandbytes.optim.Lion8bit(groups, **settings)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, eps=config.eps, fused=True, **settings)
    paged = config.kind == "paged_adamw8bit"
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return kind(groups, eps=config.eps, **settings)


def _blank(optimizer: torch.optim.Optimizer, half: nn.Parameter, place: int) -> dict[str, Any]:
    """The state that ``half`` has before its first step, in the optimizer.

    ``place``: among all halves, layer by layer.
    """
    state = optimizer.state[half]
    if isinstance(optimizer, torch.optim.AdamW):
        # The fused kernel wants the step count on the parameter's device, too.
        step = torch.zeros((), dtype=torch.float32, device=half.device)
        state |= {
            "step": step,
            "exp_avg": torch.zeros_like(half),
            "exp_avg_sq": torch.zeros_like(half),
        }
    else:
        layer, group = divmod(place, len(HALVES))
        optimizer.init_state(optimizer.param_groups[group], half, group, layer)  # type: ignore[attr-defined]
    return {key: value for key, value in state.items() if key not in CONSTANTS}
