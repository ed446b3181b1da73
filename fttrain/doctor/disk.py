"""Checks of the disk: room for the frozen base and for the checkpoints of the model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fttrain.doctor.finding import Finding, failure, ok, warning
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import resolve
from fttrain.frozen.spec import FrozenSpec, cache_bytes
from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.quant.config import QuantConfig
from fttrain.strategy.builder import frozen_base
from fttrain.util.errors import UserError
from fttrain.util.manifest import MANIFEST
from fttrain.util.units import gib

SAVED_BYTES = 12  # of each trained value: the value and AdamW's two moments in fp32


def with_frozen_base(
    model: ModelConfig, quant: QuantConfig, check: Callable[[FrozenSpec], Finding]
) -> Finding:
    """Call ``check`` with the model's frozen base; a warning where the model does not resolve."""
    try:
        return check(frozen_base(resolve(model), quant, model.dtype))
    except UserError as error:
        return warning(f"nobody knows what the model needs: {error}", "another model.path=")


def cache(base: FrozenSpec, cache_dir: str | None) -> Finding:
    """Room for the frozen base, where the cache lacks it."""
    folder = base.folder(cache_dir)
    if (folder / MANIFEST).is_file():
        return ok(f"{folder} is there")
    remedy = "free some space, or frozen.cache_dir=FOLDER with room"
    return room("the frozen base", frozen_bytes(base), folder, remedy)


def checkpoints(base: FrozenSpec, lora: LoraConfig, keep_last: int, output: Path) -> Finding:
    """Room for the checkpoints that stay, the one being written, and the adapter."""
    needed_bytes = (keep_last + 2) * SAVED_BYTES * trained_values(base.architecture, lora)
    remedy = "free some space, output=FOLDER with room, or a smaller checkpoint.keep_last"
    return room(f"checkpoint.keep_last={keep_last}", needed_bytes, output, remedy)


def frozen_bytes(base: FrozenSpec) -> int:
    """Bytes of the whole frozen base in the cache."""
    return cache_bytes(base.architecture, base.frozen_format)


def trained_values(shape: Architecture, lora: LoraConfig) -> int:
    """Values of the adapters of all layers, padding included."""
    meta = torch.device("meta")  # shapes without memory
    return shape.layers * LayerAdapters(0, shape.groups, lora, meta, torch.float32).layout.values


def room(what: str, needed_bytes: int, folder: Path, remedy: str) -> Finding:
    """``needed_bytes`` against the free bytes of the file system of ``folder``, existing or not."""
    home = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    free_bytes = shutil.disk_usage(home).free
    figure = f"{what} needs {gib(needed_bytes)}, {gib(free_bytes)} are free at {home}"
    return ok(figure) if free_bytes >= needed_bytes else failure(figure, remedy)
