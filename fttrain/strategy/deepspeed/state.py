"""What trains, by name: its groups, its start, and the optimizer's state as snapshots hold it.

With adapters that is as native strategies write it, one flat tensor for each section of a layer, so
a snapshot goes on under any of them. With whole weights it is one tensor for each.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fttrain.strategy import adapters_io
from fttrain.strategy.deepspeed import model
from fttrain.strategy.deepspeed.engine import MOMENTS, Engine, Trained
from fttrain.strategy.spec import BuildContext, StrategySpec
from fttrain.util.errors import UserError


def parameter_groups(trained: Trained, spec: StrategySpec) -> list[dict[str, Any]]:
    """As torch's optimizers take them, with ``lr_ratio``: of adapters all A's, and all B's (LoRA+);
    of whole weights matrices, and vectors, which do not decay.
    """
    if spec.lora.r:
        first = [own for name, own in trained if name.endswith("lora_A")]
        others = [own for name, own in trained if not name.endswith("lora_A")]
        more: dict[str, Any] = {"lr_ratio": spec.optim.loraplus_lr_ratio}
    else:
        # the shape under stage 3, where a rank has a part
        shapes = [getattr(own, "ds_shape", own.shape) for _, own in trained]
        first = [own for (_, own), shape in zip(trained, shapes, strict=True) if len(shape) > 1]
        others = [own for (_, own), shape in zip(trained, shapes, strict=True) if len(shape) == 1]
        more = {"lr_ratio": 1.0, "weight_decay": 0.0}
    return [{"params": first, "lr_ratio": 1.0}, {"params": others, **more}]


def check_fit(trained: Trained, values: dict[str, Tensor]) -> None:
    """Raises UserError where names or shapes differ."""
    # the shape under stage 3, where a rank has a part
    adapters_io.check_fit(
        {name: getattr(own, "ds_shape", own.shape) for name, own in trained}, values
    )


def optimizer_state(context: BuildContext, engine: Engine, trained: Trained) -> dict[str, Tensor]:
    """All a resumed run needs, on rank 0. Every rank calls it."""
    found: dict[str, Tensor] = {}
    for which in MOMENTS:
        own = engine.moments(trained, which)
        if not own:
            continue
        for name, whole in _written(context, own):
            found[f"{name}.{which}"] = whole
            found[f"{name}.step"] = torch.tensor(float(engine.steps))
    return found


def load_optimizer_state(
    context: BuildContext, engine: Engine, trained: Trained, values: dict[str, Tensor]
) -> None:
    """Takes what ``optimizer_state`` gave, here or under a native strategy. Raises UserError where
    it is that of other parameters or of another optimizer.
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
        own = {
            name.removesuffix(f".{which}"): value
            for name, value in values.items()
            if name.endswith(f".{which}")
        }
        read = dict(_read(context, own))
        check_fit(trained, read)
        engine.set_moments(trained, which, read)


def _written(context: BuildContext, own: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """By parameter -> by section of a layer."""
    if not context.spec.lora.r:
        yield from own.items()
        return
    for layer in model.layouts(context):
        whole = torch.zeros(layer.layout.values)
        for name, view in layer.named(whole):
            view.copy_(own[name])
        for section in layer.layout.own_sections():
            yield f"{layer.layer}.{section.name}", whole[section.own]


def _read(context: BuildContext, own: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """By section of a layer -> by parameter."""
    if not context.spec.lora.r:
        yield from own.items()
        return
    for layer in model.layouts(context):
        whole = torch.zeros(layer.layout.values)
        for section in layer.layout.own_sections():
            name = f"{layer.layer}.{section.name}"
            if name not in own or own[name].numel() != section.whole:
                raise UserError(
                    f"resume: the snapshot's optimizer state of {name} is not there or not that of "
                    "this adapter; it belongs to other lora settings or another model"
                )
            whole[section.own] = own[name]
        yield from layer.named(whole)
