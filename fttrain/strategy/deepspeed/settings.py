"""What DeepSpeed is told: the run's settings, what the launcher said, and a JSON of the user's own.

The three may say the same thing, and must not contradict each other. Of the JSON every key is
either honoured or refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fttrain.launcher.accelerate_yaml import DEEPSPEED_VARIABLES
from fttrain.strategy.deepspeed.user_json import AUTO, UserJson, read
from fttrain.strategy.spec import BuildContext, StrategySpec
from fttrain.strategy.zero_checks import shown
from fttrain.strategy.zero_config import DEFAULT_STAGE
from fttrain.util.errors import UserError

STAGE, FILE = "zero_stage", "deepspeed_config_file"  # keys of a launch file's deepspeed_config
STEPS, CLIPPING = "gradient_accumulation_steps", "gradient_clipping"


@dataclass(frozen=True)
class Settings:
    """What was agreed on."""

    stage: int
    offload_optimizer: bool
    offload_params: bool
    values: dict[str, Any]  # DeepSpeed's own configuration


def resolve(context: BuildContext, environment: Mapping[str, str]) -> Settings:
    """``environment``: this process's, in which accelerate says what its file does.

    Raises UserError for a contradiction, with both names; for a JSON that cannot be read, with line
    and column; and for a key of it that is unknown or cannot be honoured.
    """
    zero, spec = context.spec.strategy.zero, context.spec
    launcher = {
        key: environment[variable]
        for key, variable in DEEPSPEED_VARIABLES.items()
        if variable in environment
    }
    path = _agreed({"strategy.zero.config": zero.config, _said(FILE): launcher.get(FILE)})
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
    own = {key: value for key, (value, _) in fixed.items() if not key.startswith("optimizer.")}
    _complete(values, own | automatic)  # the optimizer is made here
    _offload(values, context, {"offload_optimizer": optimizer, "offload_param": params})
    return Settings(stage, optimizer, params, values)


def fixed_values(spec: StrategySpec, world_size: int, stage: int) -> dict[str, tuple[Any, str]]:
    """Key of DeepSpeed's configuration -> its value, and the setting of the run that says so."""
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
    """What "auto" stands for elsewhere, as transformers fills it; sizes count values."""
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


def _complete(values: dict[str, Any], everything: Mapping[str, Any]) -> None:
    """Put into ``values`` what the user's JSON left open. Gradients meet and accumulate in fp32."""
    for key, value in everything.items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values).setdefault(name, value)
    values.pop("optimizer", None)
    # A step that is left out is one whose gradient is not finite: it has to look.
    values["bf16"]["check_grad_overflow"] = values["bf16"]["enabled"]
    values["zero_allow_untested_optimizer"] = True  # AdamW, by torch or by DeepSpeed's own kernel
    values["zero_force_ds_cpu_optimizer"] = False


def _offload(values: dict[str, Any], context: BuildContext, wanted: Mapping[str, bool]) -> None:
    """``wanted``: section of ``zero_optimization`` -> whether it lies in host memory."""
    pinned = {"device": "cpu", "pin_memory": context.group.device.type == "cuda"}
    zero = values["zero_optimization"]
    for key, offloaded in wanted.items():
        own = zero.pop(key, None) or {}
        if offloaded:
            zero[key] = {**pinned, **own, "device": "cpu"}


def _stage(own: int | None, user: UserJson, launcher: Mapping[str, str]) -> int:
    said = launcher.get(STAGE)
    key = "zero_optimization.stage"
    found = _agreed(
        {
            "strategy.zero.stage": own,
            user.name(key): user.get(key),
            _said(STAGE): said if said is None or not said.isdecimal() else int(said),
        }
    )
    stage = DEFAULT_STAGE if found is None else found
    if stage not in (1, 2, 3):
        raise UserError(
            f"ZeRO stage {stage}: strategy=deepspeed takes 1, 2 or 3; strategy=replicate divides "
            "nothing"
        )
    return int(stage)


def _offloaded(what: str, own: bool | None, user: UserJson, launcher: Mapping[str, str]) -> bool:
    """``what``: optimizer | param."""
    setting = "strategy.zero.offload_" + ("params" if what == "param" else what)
    key, said = f"zero_optimization.offload_{what}.device", f"offload_{what}_device"
    devices = {user.name(key): user.get(key), _said(said): launcher.get(said)}
    for name, device in devices.items():
        if device not in (None, AUTO, "none", "cpu"):
            raise UserError(f"{name}={device}: none or cpu; nothing is offloaded to disks")
    wishes = {name: None if d in (None, AUTO) else d == "cpu" for name, d in devices.items()}
    return bool(_agreed({setting: own, **wishes}))


def _agreed(said: Mapping[str, Any]) -> Any:
    """What all that say something say; None where nobody does. Raises UserError for two answers."""
    found = [(name, value) for name, value in said.items() if value not in (None, AUTO)]
    for name, value in found[1:]:
        if value != found[0][1]:
            raise UserError(
                f"{found[0][0]}={shown(found[0][1])}, but {name}={shown(value)}: make them the "
                "same, or leave one out"
            )
    return found[0][1] if found else None


def _check_step(spec: StrategySpec, launcher: Mapping[str, str]) -> None:
    """The launch file may speak of the step, too."""
    for key, own, setting in (
        (STEPS, spec.size.gradient_accumulation_steps, "loop.gradient_accumulation_steps"),
        (CLIPPING, spec.optim.max_grad_norm, "optim.max_grad_norm"),
    ):
        try:
            different = float(launcher.get(key, "")) != own
        except ValueError:  # auto, none, or nothing
            continue
        if different:
            raise UserError(
                f"{setting}={own}, but {_said(key)}={launcher[key]}: make them the same, or leave "
                "one out"
            )


def _said(key: str) -> str:
    """How errors call what the launch file says."""
    return f"{key} of the launch file"
