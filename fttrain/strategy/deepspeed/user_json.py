"""The user's DeepSpeed configuration: read, checked, and its "auto" values filled."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fttrain.util.errors import UserError
from fttrain.util.schema import nearest

AUTO = "auto"
# Section -> the keys that are honoured; "": top-level keys
KEYS: dict[str, tuple[str, ...]] = {
    "": (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "train_batch_size",
        "gradient_clipping",
        "communication_data_type",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ),
    "zero_optimization": (
        "stage",
        "contiguous_gradients",
        "overlap_comm",
        "reduce_scatter",
        "reduce_bucket_size",
        "allgather_partitions",
        "allgather_bucket_size",
        "round_robin_gradients",
        "sub_group_size",
        "ignore_unused_parameters",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_gather_16bit_weights_on_model_save",
    ),
    "zero_optimization.offload_optimizer": ("device", "pin_memory", "buffer_count", "fast_init"),
    "zero_optimization.offload_param": (
        "device",
        "pin_memory",
        "buffer_count",
        "buffer_size",
        "max_in_cpu",
    ),
    "bf16": ("enabled",),
    "data_types": ("grad_accum_dtype",),
    "optimizer": ("type",),
    "optimizer.params": ("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"),
    "comms_logger": ("enabled", "verbose", "prof_all", "prof_ops", "debug"),
}
INSTEAD = {  # key that is refused -> the setting to use
    "fp16": "model.dtype=bfloat16 or float32 sets the precision",
    "amp": "model.dtype=bfloat16 or float32 sets the precision",
    "torch_autocast": "model.dtype=bfloat16 or float32 sets the precision",
    "scheduler": "optim.lr_schedule, optim.warmup_ratio and optim.min_lr_ratio set the rate",
    "activation_checkpointing": "activations=recompute or keep",
    "gradient_predivide_factor": "a gradient is that of the mean over the step's targets",
    "prescale_gradients": "a gradient is that of the mean over the step's targets",
    "tensorboard": "track= says where figures go",
    "wandb": "track= says where figures go",
    "csv_monitor": "track= says where figures go",
    "aio": "nothing is offloaded to disks",
    "checkpoint": "checkpoint.every and checkpoint.keep_last say when the run is saved",
}
OPTIMIZERS = ("adam", "adamw")


@dataclass(frozen=True)
class UserJson:
    """The file's ``path``, empty where there is none, and its content."""

    path: str
    values: dict[str, Any]

    def get(self, dotted: str) -> Any:
        """The value of a key such as bf16.enabled; None where it is absent."""
        value: Any = self.values
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def name(self, dotted: str) -> str:
        """The name of a key in error messages."""
        return f"{dotted} of {self.path or 'the JSON'}"

    def filled(
        self, fixed: Mapping[str, tuple[Any, str]], automatic: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A copy in which every "auto" is filled.

        ``fixed``: key -> value, and the setting of the run that fixes it; ``automatic``: key -> the
        value of "auto" for other keys. Raises UserError for a key that contradicts the run, and for
        an "auto" without a value.
        """
        filled: dict[str, Any] = {}
        for dotted, value in _leaves(self.values, ""):
            if value == AUTO:
                value = self._automatic(dotted, fixed, automatic)
            elif dotted in fixed and value != fixed[dotted][0]:
                required, setting = fixed[dotted]
                shown = setting if "=" in setting else f"{setting}={json.dumps(required)}"
                raise UserError(
                    f"{self.path}: {dotted}={json.dumps(value)}, but {shown}: make them the same, "
                    'or write "auto"'
                )
            _put(filled, dotted, value)
        return filled

    def _automatic(
        self, dotted: str, fixed: Mapping[str, tuple[Any, str]], automatic: Mapping[str, Any]
    ) -> Any:
        if dotted in fixed:
            return fixed[dotted][0]
        if dotted in automatic:
            return automatic[dotted]
        if dotted.startswith("zero_optimization.offload_") and dotted.endswith(".device"):
            return "none"  # offload that other sources ask for is written afterwards
        raise UserError(
            f'{self.path}: {dotted}="auto": nothing says what it should be; give a value'
        )


def read(path: str) -> UserJson:
    """Read and check the file. Raises UserError for a file that is missing or no JSON object, with
    line and column, and for a key that is unknown or cannot be honoured.
    """
    file = Path(path).expanduser()
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except _DuplicateKeyError as error:
        raise UserError(f"{path}: {error} is there twice") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is wanted")
    user = UserJson(path, values)
    for dotted, value in _leaves(values, ""):
        _check_key(user, dotted, value)
    kind = user.get("optimizer.type")
    if kind is not None and str(kind).lower() not in OPTIMIZERS:
        raise UserError(
            f"{path}: optimizer.type={json.dumps(kind)}: strategy=deepspeed trains with AdamW; "
            "write that, or leave the section out"
        )
    return user


class _DuplicateKeyError(ValueError):
    """A key that stands twice in a JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKeyError(key)
        values[key] = value
    return values


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all but sections; an unknown section is yielded whole."""
    for key, value in values.items():
        dotted = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and dotted in KEYS:
            yield from _leaves(value, dotted)
        else:
            yield dotted, value


def _check_key(user: UserJson, dotted: str, value: Any) -> None:
    section, _, key = dotted.rpartition(".")
    if dotted in KEYS:
        raise UserError(f"{user.path}: {dotted}={json.dumps(value)}: an object is wanted")
    if key in KEYS[section]:
        if isinstance(value, dict):
            raise UserError(f"{user.path}: {dotted}: a single value is wanted, not an object")
        return
    if key == "fp16" and isinstance(value, dict) and value.get("enabled") is False:
        return  # a common way to write that it is off
    if key in INSTEAD:
        raise UserError(f"{user.path}: {dotted}: not honoured; {INSTEAD[key]}; leave it out")
    sections = [name for name in KEYS if name and name.rpartition(".")[0] == section]
    known = [*KEYS[section], *(name.rpartition(".")[2] for name in sections)]
    near = nearest(key, known)
    advice = f"did you mean {near}?" if near else "leave it out"
    raise UserError(f"{user.path}: {dotted}: strategy=deepspeed does not honour it; {advice}")


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    if dotted == "fp16":
        return
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[key] = value
