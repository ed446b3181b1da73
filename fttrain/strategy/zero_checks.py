"""Checks of strategy=deepspeed: settings that it cannot honour, or that it alone can, are refused
by name.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fttrain.model.config import LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.quant.config import QuantConfig
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.util.errors import UserError


def check_whole_weights(strategy: str, lora: LoraConfig, quant: QuantConfig) -> None:
    """Raise UserError where all weights are to train and cannot."""
    if lora.r:
        return
    if strategy != DEEPSPEED:
        raise UserError(
            f"lora.r=0 with strategy={strategy}: its base is frozen; strategy={DEEPSPEED} trains "
            "all weights, or give lora.r a rank such as 16"
        )
    if quant.is_quantised:
        raise UserError(
            f"lora.r=0 with quant={quant.kind}: weights in 4 bits cannot train; write quant=none"
        )


def check_zero(lora: LoraConfig, optim: OptimConfig, schedule: ScheduleConfig) -> None:
    """Raise UserError where DeepSpeed is missing, and for settings that it would not honour."""
    if importlib.util.find_spec("deepspeed") is None:  # looks for it without importing it
        raise UserError(
            f"strategy={DEEPSPEED}: DeepSpeed is not installed, which "
            "pip install --no-build-isolation 'fttrain[deepspeed]' does"
        )
    if lora.use_dora:
        raise UserError(
            f"lora.use_dora=true with strategy={DEEPSPEED}: it computes with magnitudes in bf16, "
            "in which the model at the start would not be the base; another strategy helps, or "
            "lora.use_rslora"
        )
    if optim.kind != "adamw" or optim.offload or optim.shard:
        key = "kind" if optim.kind != "adamw" else "offload" if optim.offload else "shard"
        instead = {
            "kind": "it trains with AdamW (strategy.zero.offload_optimizer=true: DeepSpeed's, in "
            "host memory); write optim=adamw",
            "offload": "strategy.zero.offload_optimizer=true does that",
            "shard": "ZeRO divides the optimizer's state in any stage; leave it out",
        }
        raise UserError(
            f"optim.{key}={shown(getattr(optim, key))} with strategy={DEEPSPEED}: {instead[key]}"
        )
    _check_default(
        schedule, "schedule.", {"kind": "it has its own order", "micro_batch_group": "likewise"}
    )


def check_placement(placement: Any, quant: QuantConfig) -> None:
    """Raise UserError for a placement of tensors that DeepSpeed does not offer."""
    if placement.activations not in ("recompute", "keep"):
        raise UserError(
            f"activations={shown(placement.activations)} with strategy={DEEPSPEED}: recompute or "
            "keep, for all layers"
        )
    remedy = (
        "strategy.zero.stage=3 with strategy.zero.offload_params=true keeps weights on the host"
    )
    _check_default(
        placement,
        "",
        {
            "layer_inputs": "what layers leave for backward stays on the device",
            "embedding": remedy,
            "lm_head": remedy,
            "mlp_tile_tokens": "an MLP runs whole",
        },
    )
    _check_default(quant, "quant.", {"dequant": "bitsandbytes goes linear by linear"})


def refuse_deepspeed_launch(strategy: str, environment: Mapping[str, str]) -> None:
    """Raise UserError where accelerate's launch file says DeepSpeed and ``strategy`` is native."""
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            f"strategy={strategy}, but the launch file says distributed_type: DEEPSPEED; write "
            "strategy=deepspeed, or a launch file of MULTI_GPU"
        )


def _check_default(config: Any, prefix: str, reasons: dict[str, str]) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in reasons and value != field.default:
            raise UserError(
                f"{prefix}{field.name}={shown(value)} belongs to native strategies, not to "
                f"strategy={DEEPSPEED}: {reasons[field.name]}; leave it out"
            )


def shown(value: Any) -> str:
    """The value as it is written on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
