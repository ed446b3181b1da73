"""Parameter groups, and the optimizer's state as snapshots hold it.

With adapters a snapshot has the native strategies' format, one flat tensor for each section of a
layer, so a run can go on under any strategy. With whole weights it has one tensor a parameter.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fttrain.strategy import adapters_io
from fttrain.strategy.context import BuildContext
from fttrain.strategy.deepspeed import model
from fttrain.strategy.deepspeed.engine import MOMENTS, Engine, Trained
from fttrain.strategy.spec import StrategySpec
from fttrain.util.errors import UserError


def parameter_groups(trained: Trained, spec: StrategySpec) -> list[dict[str, Any]]:
    """Parameter groups of torch's optimizers, with ``lr_ratio``. Adapters: all A's, and all B's
    (LoRA+). Whole weights: matrices, and vectors, which do not decay.
    """
    if spec.lora.r:
        first = [parameter for name, parameter in trained if name.endswith("lora_A")]
        others = [parameter for name, parameter in trained if not name.endswith("lora_A")]
        more: dict[str, Any] = {"lr_ratio": spec.optim.loraplus_lr_ratio}
    else:
        first = [parameter for _, parameter in trained if len(_shape(parameter)) > 1]
        others = [parameter for _, parameter in trained if len(_shape(parameter)) == 1]
        more = {"lr_ratio": 1.0, "weight_decay": 0.0}
    return [{"params": first, "lr_ratio": 1.0}, {"params": others, **more}]


def _shape(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape, also under stage 3, where a rank has a partition of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def check_fit(trained: Trained, values: dict[str, Tensor]) -> None:
    """Raise UserError where names or shapes differ."""
    adapters_io.check_fit({name: _shape(parameter) for name, parameter in trained}, values)


def optimizer_state(context: BuildContext, engine: Engine, trained: Trained) -> dict[str, Tensor]:
    """The optimizer's state in a snapshot's format, on rank 0. A collective call."""
    state: dict[str, Tensor] = {}
    for which in MOMENTS:
        moments = engine.moments(trained, which)
        if not moments:
            continue
        for name, whole in _to_sections(context, moments):
            state[f"{name}.{which}"] = whole
            state[f"{name}.step"] = torch.tensor(float(engine.steps))
    return state


def load_optimizer_state(
    context: BuildContext, engine: Engine, trained: Trained, values: dict[str, Tensor]
) -> None:
    """Load the result of ``optimizer_state``, of this or of a native strategy. Raises UserError for
    the state of other parameters or of another optimizer.
    """
    if not values:
        return
    kinds = {name.rpartition(".")[2] for name in values}
    if kinds != {"step", *MOMENTS}:
        raise UserError(
            f"resume: the optimizer state has {', '.join(sorted(kinds))}, wanted are step, "
            f"{', '.join(MOMENTS)}; the snapshot belongs to another optim.kind"
        )
    steps = next(int(value) for name, value in values.items() if name.endswith(".step"))
    engine.set_steps(steps)
    for which in MOMENTS:
        sections = {
            name.removesuffix(f".{which}"): value
            for name, value in values.items()
            if name.endswith(f".{which}")
        }
        moments = dict(_from_sections(context, sections))
        check_fit(trained, moments)
        engine.set_moments(trained, which, moments)


def _to_sections(context: BuildContext, moments: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Moments by parameter -> by section of a layer."""
    if not context.spec.lora.r:
        yield from moments.items()
        return
    for layer in model.layouts(context):
        whole = torch.zeros(layer.layout.values)
        for name, view in layer.named(whole):
            view.copy_(moments[name])
        for section in layer.layout.local_sections():
            yield f"{layer.layer}.{section.name}", whole[section.span]


def _from_sections(
    context: BuildContext, moments: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Moments by section of a layer -> by parameter."""
    if not context.spec.lora.r:
        yield from moments.items()
        return
    for layer in model.layouts(context):
        whole = torch.zeros(layer.layout.values)
        for section in layer.layout.local_sections():
            name = f"{layer.layer}.{section.name}"
            if name not in moments or moments[name].numel() != section.whole:
                raise UserError(
                    f"resume: the snapshot's optimizer state of {name} is not there or not that of "
                    "this adapter; it belongs to other lora settings or another model"
                )
            whole[section.span] = moments[name]
        yield from layer.named(whole)
