"""What DeepSpeed is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fttrain.strategy.recipe import Plan
from fttrain.strategy.zero.config import DEFAULT_STAGE


@dataclass(frozen=True)
class Settings:
    stage: int
    offload_optimizer: bool
    offload_params: bool
    values: dict[str, Any]


def resolve(plan: Plan, environment: Mapping[str, str]) -> Settings:
    zero, recipe = plan.recipe.strategy.zero, plan.recipe
    stage = zero.stage or DEFAULT_STAGE
    size = recipe.size
    zo: dict[str, Any] = {"stage": stage}
    if zero.offload_optimizer:
        zo["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_params:
        zo["offload_param"] = {"device": "cpu"}
    bf16 = recipe.dtype == "bfloat16"
    values = {
        "train_micro_batch_size_per_gpu": size.micro_batch_size,
        "gradient_accumulation_steps": size.gradient_accumulation_steps,
        "train_batch_size": size.micro_batch_size * size.gradient_accumulation_steps * plan.group.world_size,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "zero_optimization": zo,
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return Settings(stage, bool(zero.offload_optimizer), bool(zero.offload_params), values)
