"""A model's configuration before anything is downloaded: its own config.json, where it is on this
machine, else the one that ships in ``conf/model/architectures/``.
"""

import functools
import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig

from fttrain.frozen.config import ModelConfig
from fttrain.frozen.hub import SHAPES
from fttrain.frozen.source import load_config, resolve
from fttrain.util.paths import conf_folder

_HUB_ID = "_name_or_path"  # key of the repository that a shipped config.json was published in


def planned_config(model: ModelConfig) -> PretrainedConfig:
    """transformers' configuration of ``model``, for its shapes alone.

    A shipped one stands for the default branch of a hub id that the hub's cache does not hold; it
    has no token ids. The hub is asked for all others. Raises UserError where nothing is found.
    """
    name = _shipped_names().get(model.path or "")
    if name and model.revision is None and not _is_cached(model.path or ""):
        return shipped_config(name)
    return load_config(resolve(model, SHAPES))


def shipped_config(name: str) -> PretrainedConfig:
    """transformers' configuration from ``conf/model/architectures/NAME.json``."""
    fields = _fields(_folder() / f"{name}.json")
    del fields[_HUB_ID]
    config: PretrainedConfig = AutoConfig.for_model(**fields)
    return config


@functools.cache
def _shipped_names() -> dict[str, str]:
    """Hub id -> name of the file."""
    return {_fields(path)[_HUB_ID]: path.stem for path in _folder().glob("*.json")}


def _is_cached(hub_id: str) -> bool:
    return isinstance(try_to_load_from_cache(hub_id, SHAPES[0]), str)


def _fields(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_text())
    return fields


def _folder() -> Path:
    return conf_folder() / "model" / "architectures"
