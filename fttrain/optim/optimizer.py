"""The optimizer over the flat fp32 masters of the layers' adapters."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
from bitsandbytes.optim.lion import Lion8bit
from torch import Tensor, nn

from fttrain.optim import cpu_adam
from fttrain.optim.config import OptimConfig
from fttrain.optim.cpu_adam import CpuAdam
from fttrain.optim.flat import BLOCK_VALUES, Section
from fttrain.util.errors import UserError

# Keys of bitsandbytes' state that hold constants.
CONSTANTS = ("qmap1", "qmap2")


def moment_bytes(config: OptimConfig, values: int) -> int:
    """Bytes of the moments that the optimizer has for ``values`` trained values."""
    if config.kind in ("adamw", "deepspeed_cpu_adam"):
        return 8 * values
    blocks = -(-values // BLOCK_VALUES)
    return (1 if config.kind == "lion8bit" else 2) * (values + 4 * blocks)


def check_available(config: OptimConfig) -> None:
    """Raise UserError where a kernel of the optimizer is not available. May compile it, which takes
    a minute.
    """
    if config.kind == "deepspeed_cpu_adam":
        cpu_adam.kernel()


class _Layer(NamedTuple):
    """One layer's shard, and its sections with their values, views of it."""

    flat: nn.Parameter
    sections: list[tuple[Section, nn.Parameter]]


class Optimizer:
    """The optimizer of this rank's shard of each layer's flat fp32 parameter, updated in place from
    its ``grad``.

    adamw is torch's fused AdamW (Loshchilov and Hutter 2019), deepspeed_cpu_adam DeepSpeed's (see
    ``cpu_adam``), the others are bitsandbytes' (Dettmers et al. 2022; Lion: Chen et al. 2023).
    """

    def __init__(
        self,
        shards: Iterable[tuple[nn.Parameter, Sequence[Section]]],
        config: OptimConfig,
        first_layer: int = 0,
    ) -> None:
        """``shards``: each layer's shard and the sections in it; ``first_layer``: index of the
        first of these layers in the whole model.
        """
        shards = list(shards)
        self._first_layer = first_layer
        # LoRA+; the magnitudes get the ratio of the B's, as in PEFT's optimizer for it
        self._ratios = dict.fromkeys(("b", "m"), config.loraplus_lr_ratio)
        # Views of the flat masters; autograd never sees them.
        self._layers = [
            _Layer(flat, [(section, nn.Parameter(flat.data[section.span])) for section in sections])
            for flat, sections in shards
        ]
        # One for each layer: a layer's step runs as soon as its gradient is complete.
        self._optimizers = [
            make([{"params": [values]} for _, values in layer.sections], config)
            if layer.sections
            else None
            for layer in self._layers
        ]

    def step(self, layer: int, lr: float) -> None:
        """Update the shard of ``layer``, an index into ``shards``, from its ``grad``; ``lr`` is the
        learning rate of the A's.
        """
        optimizer, (flat, sections) = self._optimizers[layer], self._layers[layer]
        if optimizer is None:
            return
        assert flat.grad is not None
        for (section, values), group in zip(sections, optimizer.param_groups, strict=True):
            values.grad = flat.grad[section.span]
            group["lr"] = lr * self._ratios.get(section.name, 1.0)
        optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state by flat name, as a resumed run needs it: ``0.a.exp_avg`` is the
        first moment of layer 0's A's. Each rank has the values of its shard; the ranks' values end
        to end are the whole.
        """
        return {
            f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, _, values, optimizer, _ in self._named()
            for key, value in optimizer.state[values].items()
            if key not in CONSTANTS
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load ``state``, the values of all ranks' ``state()`` end to end.

        Raises UserError where it belongs to other parameters or to another optimizer.
        """
        for name, section, values, optimizer, group in self._named():
            prefix = f"{name}."
            section_state = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
            if section_state:
                blank = blank_state(optimizer, values, group)
                _restore(blank, optimizer.state[values], name, section, section_state)
            elif state:
                raise UserError(
                    f"resume: the snapshot has no optimizer state of {name}; it belongs to another "
                    "model or another version"
                )

    def _named(self) -> Iterator[tuple[str, Section, nn.Parameter, torch.optim.Optimizer, int]]:
        """The (name, section, values, optimizer, index of its parameter group) of every section."""
        for index, (layer, optimizer) in enumerate(
            zip(self._layers, self._optimizers, strict=True), self._first_layer
        ):
            for group, (section, values) in enumerate(layer.sections):
                assert optimizer is not None
                yield f"{index}.{section.name}", section, values, optimizer, group


def _restore(
    blank: dict[str, Any],
    state: dict[str, Any],
    name: str,
    section: Section,
    whole: dict[str, Tensor],
) -> None:
    """Copy this rank's part of ``whole``, the state of a section over all ranks, into the
    optimizer's ``state``, which holds ``blank`` and constants so far.
    """
    if blank.keys() != whole.keys():
        raise UserError(
            f"resume: the optimizer state of {name} has {', '.join(sorted(whole))}, wanted are "
            f"{', '.join(sorted(blank))}; the snapshot belongs to another optim.kind"
        )
    for key, value in whole.items():
        target = blank[key]
        if not isinstance(target, Tensor):
            state[key] = int(value)
            continue
        each = _values_per_entry(target, section)
        if target.dim() and value.numel() != section.whole // each:
            raise UserError(
                f"resume: the optimizer state of {name} has {value.numel()} values of {key}, "
                f"the adapter {section.whole // each}; the snapshot belongs to other lora settings"
            )
        first = section.first // each
        target.copy_(value[first : first + len(target)] if target.dim() else value)


def _values_per_entry(state: Tensor, section: Section) -> int:
    """The number of the section's values that share one entry of ``state``: one or a block."""
    return (section.span.stop - section.span.start) // max(1, state.numel())


def make(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over ``groups`` as torch's optimizers take them."""
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, eps=config.eps, fused=True, **settings)
    if config.kind == "deepspeed_cpu_adam":
        return CpuAdam(groups, eps=config.eps, **settings)
    # Otherwise a shard of few values would have fp32 moments, and moments would depend on the
    # number of ranks.
    settings["min_8bit_size"] = 1
    if config.kind == "lion8bit":
        return Lion8bit(groups, **settings)
    kind = PagedAdamW8bit if config.kind == "paged_adamw8bit" else AdamW8bit
    return kind(groups, eps=config.eps, **settings)


def blank_state(optimizer: torch.optim.Optimizer, values: Tensor, group: int) -> dict[str, Any]:
    """The optimizer's state of ``values``, alone in their ``group``, before the first step."""
    state = optimizer.state[values]
    if isinstance(optimizer, torch.optim.AdamW):
        # The fused kernel needs the step count on the parameter's device.
        state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(values), torch.zeros_like(values)
    elif isinstance(optimizer, CpuAdam):
        optimizer.init_state(values)
    else:
        optimizer.init_state(optimizer.param_groups[group], values, group, 0)  # type: ignore[attr-defined]
    return {key: value for key, value in state.items() if key not in CONSTANTS}
