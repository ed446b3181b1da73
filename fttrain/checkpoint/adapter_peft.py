"""LoRA adapters in PEFT's format, read and written. Plain PEFT loads the files as they are.

Legend: r rank; in, out features of the linear that an adapter sits on.

    adapter_config.json         r, lora_alpha, target_modules ...
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight
    (out, r), and with DoRA .lora_magnitude_vector (out,)

Inside this program the same tensors are called "<module>.lora_A", "<module>.lora_B" and
"<module>.lora_magnitude_vector", for example "model.layers.0.self_attn.q_proj.lora_A".
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fttrain.util import atomic_files
from fttrain.util.errors import UserError
from fttrain.util.tensor_files import tensor_bytes, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(
    r"(?P<layer>model\.layers\.\d+)\.(?P<module>[\w.]+)\.lora_(?P<side>A|B|magnitude_vector)"
)

# Settings of PEFT that do not change how a finished adapter acts; all others must be neutral.
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "exclude_modules", "megatron_core", "qalora_group_size", "runtime_config",
    "init_lora_weights", "eva_config", "loftq_config", "ensure_weight_tying",
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora",
}  # fmt: skip
NEUTRAL: tuple[object, ...] = (None, False, "none", {}, [])
INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # these leave the base as it is


@dataclass(frozen=True)
class AdapterInfo:
    """The settings of an adapter beside its tensors, under PEFT's names and with their meanings."""

    r: int  # rank
    lora_alpha: float  # the update is scaled by lora_alpha / r (rsLoRA: / sqrt(r))
    lora_dropout: float = 0.0  # probability
    target_modules: str | tuple[str, ...] = "all-linear"  # names of linears, or all-linear
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def sides(self) -> set[str]:
        """The tensors of each adapted linear, by the part of their names after ``lora_``."""
        return {"A", "B", "magnitude_vector"} if self.use_dora else {"A", "B"}


def save_adapter(
    folder: Path | str,
    state: Mapping[str, Tensor],
    lora: AdapterInfo,
    base_model: str,
    revision: str | None = None,
) -> None:
    """Write ``state`` to ``folder`` so that ``PeftModel.from_pretrained(base, folder)`` loads it.

    Args:
        folder: made when it is not there; an adapter in it is replaced.
        state: our names -> (r, in), (out, r) and (out,), any device, any float dtype; saved in that
            dtype.
        lora: target_modules is written as the names that ``state`` really holds, which every
        version
            of PEFT reads.
        base_model: name or path that PEFT shows as the base.
        revision: of the base on its hub.

    Raises:
        UserError: an empty, non-finite, missing or misshapen tensor, by name; or a disk that is
            full.
    """
    folder = Path(folder)
    modules = check(state, lora, str(folder))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": modules,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    tensors = {_key(name): tensor for name, tensor in state.items()}
    with atomic_files.room_for(folder, tensor_bytes(tensors), "saving the adapter"):
        atomic_files.make_folder(folder)
        text = (json.dumps(config, indent=2) + "\n").encode()
        old = folder / CONFIG
        if old.exists() and old.read_bytes() != text:
            # a kill between the two files must not leave new weights under an old scale
            old.unlink()
            atomic_files.sync(folder)
        atomic_files.replace(folder / WEIGHTS, lambda part: write_tensors(part, tensors))
        atomic_files.replace(old, lambda part: atomic_files.write_bytes(part, text))


def load_adapter(folder: Path | str) -> tuple[dict[str, Tensor], AdapterInfo]:
    """Read an adapter saved by this program or by PEFT.

    Returns:
        fp32 tensors on the CPU under our names, as ``save_adapter`` takes them, and the settings,
        whose target_modules are the names that the file really holds, sorted.

    Raises:
        UserError: not an adapter, not LoRA, a feature that this program does not have (by name), or
            a bad tensor.
    """
    folder = Path(folder)
    config = _read_config(folder)
    info = AdapterInfo(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0),
        use_rslora=config.get("use_rslora", False),
        use_dora=config.get("use_dora", False),
    )
    state = {}
    for key, tensor in _read_weights(folder).items():
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        if not NAME.fullmatch(name) or _key(name) != key:
            raise UserError(
                f"{folder / WEIGHTS}: {key} is no LoRA tensor of a decoder layer's linear: not "
                "supported"
            )
        if not tensor.is_floating_point():
            raise UserError(
                f"{folder / WEIGHTS}: {key} is {tensor.dtype}: floating point is needed"
            )
        state[name] = tensor.to(torch.float32)
    modules = check(state, info, str(folder / WEIGHTS))
    return state, replace(info, target_modules=tuple(modules))


def check(state: Mapping[str, Tensor], info: AdapterInfo, where: str) -> list[str]:
    """The sorted names of the linears that ``state`` adapts; every tensor is checked.

    Raises:
        UserError: a tensor is wrong; the text has ``where`` and its name.
    """
    if not state:
        raise UserError(f"{where}: the adapter holds no tensors")
    layers: dict[str, dict[str, set[str]]] = {}  # layer -> module -> sides
    for name, tensor in state.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"{where}: {name} is not the name of a LoRA tensor "
                "(model.layers.<n>.<module>.lora_A|B|magnitude_vector)"
            )
        problem = _problem(match["side"], tensor, info.r)
        if problem:
            raise UserError(f"{where}: {name} {problem}")
        layers.setdefault(match["layer"], {}).setdefault(match["module"], set()).add(match["side"])
    _check_complete(layers, info, where)
    every = {module for modules in layers.values() for module in modules}
    leaves = {module.rpartition(".")[2] for module in every}
    if not isinstance(info.target_modules, str):
        absent = sorted({target.rpartition(".")[2] for target in info.target_modules} ^ leaves)
        if absent:
            raise UserError(
                f"{where}: {absent[0]} is in lora.target_modules or in the tensors, but not in both"
            )
    return sorted(leaves)


def _check_complete(layers: dict[str, dict[str, set[str]]], info: AdapterInfo, where: str) -> None:
    """Raise UserError for a linear that lacks a tensor, or a layer that lacks a linear."""
    every = {module for modules in layers.values() for module in modules}
    for layer, modules in layers.items():
        for module, sides in modules.items():
            name = f"{layer}.{module}.lora_"
            if info.sides - sides:
                missing, there = min(info.sides - sides), min(sides)
                raise UserError(f"{where}: {name}{there} is there, {name}{missing} is missing")
            if sides - info.sides:
                extra = min(sides - info.sides)
                raise UserError(f"{where}: {name}{extra} is there without use_dora")
        if every - modules.keys():
            lacking = min(every - modules.keys())
            raise UserError(f"{where}: {layer} lacks {lacking}, which other layers adapt")


def _key(name: str) -> str:
    """PEFT's name in the file for our name of a tensor."""
    return f"{PREFIX}{name}" if name.endswith("vector") else f"{PREFIX}{name}.weight"


def _problem(side: str, tensor: Tensor, r: int) -> str | None:
    """The fault of a tensor; None without one."""
    if tensor.numel() == 0:
        return f"is empty, of shape {tuple(tensor.shape)}"
    shape = tuple(tensor.shape)
    form, fits = {
        "A": (f"({r}, in)", len(shape) == 2 and shape[0] == r),
        "B": (f"(out, {r})", len(shape) == 2 and shape[1] == r),
        "magnitude_vector": ("(out,)", len(shape) == 1),
    }[side]
    if not fits:
        return f"has shape {shape} instead of {form}"
    if not torch.isfinite(tensor).all():
        return "holds values that are not finite"
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises UserError for a setting that would change what the
    adapter does.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: no {CONFIG} here: give the folder of a LoRA adapter") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: peft_type={kind}: only LORA is supported")
    init = config.get("init_lora_weights")
    if not any(init is known or init == known for known in INITS):
        raise UserError(
            f"{path}: init_lora_weights={init} changes the base's weights: save it converted to "
            "plain LoRA"
        )
    for key, value in config.items():
        if key not in HARMLESS and not any(
            type(value) is type(none) and value == none for none in NEUTRAL
        ):
            raise UserError(f"{path}: {key}={json.dumps(value)} is not supported")
    _check_number(path, config, "r", 1, whole=True)
    _check_number(path, config, "lora_alpha", 0)
    _check_number(path, {"lora_dropout": 0.0, **config}, "lora_dropout", 0)
    return config


def _check_number(
    path: Path, config: dict[str, Any], key: str, least: int, whole: bool = False
) -> None:
    value = config.get(key)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
        raise UserError(f"{path}: {key}={json.dumps(value)}: must be a number of at least {least}")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder}: adapter_model.bin is a pickle, which can run code: save it as "
            "safetensors with PEFT"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({str(error).partition(os.linesep)[0]})"
        ) from error
