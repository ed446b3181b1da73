"""DeepSpeed's configuration, from the run's settings, the launch file and the user's JSON.

The three sources may repeat each other, and must not contradict each other. Every key of the JSON
is either honoured or refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fttrain.launcher.accelerate_yaml import DEEPSPEED_VARIABLES
from fttrain.strategy.context import BuildContext
from fttrain.strategy.deepspeed.user_json import AUTO, UserJson, read
from fttrain.strategy.spec import StrategySpec
from fttrain.strategy.zero_checks import shown
from fttrain.strategy.zero_config import DEFAULT_STAGE
from fttrain.util.errors import UserError

STAGE, FILE = "zero_stage", "deepspeed_config_file"  # keys of a launch file's deepspeed_config
STEPS, CLIPPING = "gradient_accumulation_steps", "gradient_clipping"


@dataclass(frozen=True)
class Settings:
    """The resolved settings of ZeRO."""

    stage: int
    offload_optimizer: bool
    offload_params: bool
    values: dict[str, Any]  # DeepSpeed's configuration


def resolve(context: BuildContext, environment: Mapping[str, str]) -> Settings:
    """Resolve the settings of ZeRO. ``environment``: the process's, which holds accelerate's
    settings.

    Raises UserError for a contradiction, with both names; for a JSON that cannot be read, with line
    and column; and for a key of it that is unknown or cannot be honoured.
    """
    zero, spec = context.spec.strategy.zero, context.spec
    launcher = {
        key: environment[variable]
        for key, variable in DEEPSPEED_VARIABLES.items()
        if variable in environment
    }
    path = _resolve_one(
        {"strategy.zero.config": zero.config, _in_launch_file(FILE): launcher.get(FILE)}
    )
    user = read(path) if path else UserJson("", {})
    stage = _stage(zero.stage, user, launcher)
    optimizer = _offloaded("optimizer", zero.offload_optimizer, user, launcher)
    params = _offloaded("param", zero.offload_params, user, launcher)
    if params and stage != 3:
        raise UserError(
            f"strategy.zero.offload_params=true with stage {stage}: stage 3 alone divides weights; "
            "write strategy.zero.stage=3, or leave it out"
        )
    _check_step(spec, launcher)
    fixed = fixed_values(spec, context.group.world_size, stage)
    automatic = _automatic(context, stage)
    values = user.filled(fixed, automatic)
    # The optimizer is built here, not by DeepSpeed.
    engine = {key: value for key, (value, _) in fixed.items() if not key.startswith("optimizer.")}
    _complete(values, engine | automatic)
    _offload(values, context, {"offload_optimizer": optimizer, "offload_param": params})
    return Settings(stage, optimizer, params, values)


def fixed_values(spec: StrategySpec, world_size: int, stage: int) -> dict[str, tuple[Any, str]]:
    """Key of DeepSpeed's configuration -> its value, and the setting of the run that fixes it."""
    size, optim = spec.size, spec.optim
    rows, steps = size.micro_batch_size, size.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": (rows, "loop.micro_batch_size"),
        "gradient_accumulation_steps": (steps, "loop.gradient_accumulation_steps"),
        "train_batch_size": (
            rows * steps * world_size,
            "loop.micro_batch_size x loop.gradient_accumulation_steps x ranks",
        ),
        "gradient_clipping": (optim.max_grad_norm, "optim.max_grad_norm"),
        "bf16.enabled": (spec.dtype == "bfloat16", f"model.dtype={spec.dtype}"),
        "optimizer.params.lr": (optim.lr, "optim.lr"),
        "optimizer.params.betas": (list(optim.betas), "optim.betas"),
        "optimizer.params.eps": (optim.eps, "optim.eps"),
        "optimizer.params.weight_decay": (optim.weight_decay, "optim.weight_decay"),
        "zero_optimization.stage": (stage, "strategy.zero.stage"),
    }


def _automatic(context: BuildContext, stage: int) -> dict[str, Any]:
    """The values of "auto" for all other keys, as transformers fills them; sizes count values."""
    hidden = context.architecture.hidden
    return {
        "zero_optimization.reduce_bucket_size": hidden * hidden,
        "zero_optimization.stage3_prefetch_bucket_size": hidden * hidden * 9 // 10,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden,
        "zero_optimization.overlap_comm": stage == 3 and context.group.device.type == "cuda",
        "zero_optimization.contiguous_gradients": True,
        "communication_data_type": "fp32",
        "data_types.grad_accum_dtype": "fp32",
    }


def _complete(values: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Fill ``values`` with ``defaults`` where the user's JSON is silent. Gradients are reduced and
    accumulated in fp32.
    """
    for key, value in defaults.items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values).setdefault(name, value)
    values.pop("optimizer", None)
    # A step is skipped by a gradient that is not finite, so DeepSpeed must check for it.
    values["bf16"]["check_grad_overflow"] = values["bf16"]["enabled"]
    values["zero_allow_untested_optimizer"] = True  # AdamW, of torch or of DeepSpeed's CPU kernel
    values["zero_force_ds_cpu_optimizer"] = False


def _offload(values: dict[str, Any], context: BuildContext, sections: Mapping[str, bool]) -> None:
    """Write the offload ``sections`` of ``zero_optimization``: name -> whether it is offloaded."""
    pinned = {"device": "cpu", "pin_memory": context.group.device.type == "cuda"}
    zero = values["zero_optimization"]
    for key, offloaded in sections.items():
        section = zero.pop(key, None) or {}
        if offloaded:
            zero[key] = {**pinned, **section, "device": "cpu"}


def _stage(setting: int | None, user: UserJson, launcher: Mapping[str, str]) -> int:
    """The stage. ``setting``: strategy.zero.stage."""
    text, key = launcher.get(STAGE), "zero_optimization.stage"
    resolved = _resolve_one(
        {
            "strategy.zero.stage": setting,
            user.name(key): user.get(key),
            _in_launch_file(STAGE): text if text is None or not text.isdecimal() else int(text),
        }
    )
    stage = DEFAULT_STAGE if resolved is None else resolved
    if stage not in (1, 2, 3):
        raise UserError(
            f"ZeRO stage {stage}: strategy=deepspeed takes 1, 2 or 3; strategy=replicate divides "
            "nothing"
        )
    return int(stage)


def _offloaded(
    kind: str, setting: bool | None, user: UserJson, launcher: Mapping[str, str]
) -> bool:
    """Whether ``kind`` (optimizer | param) is offloaded. ``setting``: that of the run."""
    setting_name = "strategy.zero.offload_" + ("params" if kind == "param" else kind)
    key, variable = f"zero_optimization.offload_{kind}.device", f"offload_{kind}_device"
    devices = {user.name(key): user.get(key), _in_launch_file(variable): launcher.get(variable)}
    for name, device in devices.items():
        if device not in (None, AUTO, "none", "cpu"):
            raise UserError(f"{name}={device}: none or cpu; nothing is offloaded to disks")
    flags = {name: None if d in (None, AUTO) else d == "cpu" for name, d in devices.items()}
    return bool(_resolve_one({setting_name: setting, **flags}))


def _resolve_one(by_source: Mapping[str, Any]) -> Any:
    """The one value of all sources that have one; None where none has. Raises UserError for two
    different values.
    """
    given = [(name, value) for name, value in by_source.items() if value not in (None, AUTO)]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise UserError(
                f"{given[0][0]}={shown(given[0][1])}, but {name}={shown(value)}: make them the "
                "same, or leave one out"
            )
    return given[0][1] if given else None


def _check_step(spec: StrategySpec, launcher: Mapping[str, str]) -> None:
    """Raise UserError where the launch file contradicts the step's settings."""
    for key, value, setting in (
        (STEPS, spec.size.gradient_accumulation_steps, "loop.gradient_accumulation_steps"),
        (CLIPPING, spec.optim.max_grad_norm, "optim.max_grad_norm"),
    ):
        try:
            different = float(launcher.get(key, "")) != value
        except ValueError:  # auto, none, or nothing
            continue
        if different:
            raise UserError(
                f"{setting}={value}, but {_in_launch_file(key)}={launcher[key]}: make them the "
                "same, or leave one out"
            )


def _in_launch_file(key: str) -> str:
    """The name of a launch file's key in error messages."""
    return f"{key} of the launch file"
