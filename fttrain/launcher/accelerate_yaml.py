"""Launch files: accelerate's YAML, and the ``.env`` file beside it with the ranks' variables."""

from pathlib import Path
from typing import Any

import yaml

from fttrain.util.errors import UserError
from fttrain.util.paths import launch_folder

DEEPSPEED = "DEEPSPEED"  # distributed_type of a launch file
DEEPSPEED_VARIABLES = {  # key of its deepspeed_config -> the environment variable of its ranks
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
}


def read_files(file: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of ``launch.file`` and the variables of its ranks; both empty without one.

    Raises UserError where it is missing, or cannot be used.
    """
    if file is None:
        return {}, {}
    path = launch_folder() / file  # an absolute path stays itself
    if not path.is_file():
        names = ", ".join(sorted(known.name for known in launch_folder().glob("*.yaml")))
        raise UserError(
            f"launch.file={file}: no such file; there are {names}, or give an absolute path"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: an accelerate config file holds `key: value` lines")
    machines = integer(settings, "num_machines", 1)
    if machines != 1:
        processes = integer(settings, "num_processes", machines) // max(1, machines)
        raise UserError(
            f"{path}: num_machines: launch= serves one machine; on each of {machines}: `accelerate "
            f"launch --config_file {path} --machine_rank N --main_process_ip FIRST -m fttrain "
            f"train ...`, or `torchrun --nnodes {machines} --nproc-per-node {processes} "
            "--max-restarts 3 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 -m fttrain train "
            "...`, where FIRST is the first machine's address"
        )
    if settings.get("distributed_type") not in (None, "NO", "MULTI_GPU", "MULTI_CPU", DEEPSPEED):
        kind = settings["distributed_type"]
        raise UserError(
            f"{path}: distributed_type: {kind}: write MULTI_GPU or 'NO' (strategy= shards), or "
            f"{DEEPSPEED} (strategy=deepspeed)"
        )
    beside = path.with_suffix(".env")
    variables = read_env(beside) if beside.is_file() else {}
    return settings, variables | _deepspeed_variables(path, settings)


def _deepspeed_variables(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The variables that `accelerate launch` sets for the ranks of a file of type DEEPSPEED."""
    if settings.get("distributed_type") != DEEPSPEED:
        return {}
    section = settings.get("deepspeed_config") or {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: deepspeed_config: `key: value` lines are wanted")
    variables = {
        variable: str(section[key]).lower() if isinstance(section[key], bool) else str(section[key])
        for key, variable in DEEPSPEED_VARIABLES.items()
        if section.get(key) is not None
    }
    return {"ACCELERATE_USE_DEEPSPEED": "true", **variables}


def integer(settings: dict[str, Any], key: str, default: int) -> int:
    """The whole number under ``key``, or ``default``. Raises UserError for anything else."""
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"launch file: {key}: {value!r}: a whole number is wanted")
    return value


def read_env(path: Path) -> dict[str, str]:
    """The variables of a file with ``NAME=value`` lines, which a shell can read as well; everything
    after `` #`` is a comment. Raises UserError for any other line.
    """
    variables: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or set(value) & set(" \t'\"$`\\;&|<>()"):
            raise UserError(
                f"{path}:{number}: {text!r}: write NAME=value, without quotes, blanks or $"
            )
        variables[name] = value
    return variables
