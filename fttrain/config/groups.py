"""The options of the configuration groups: files in ``conf/GROUP/``, or a user's own."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fttrain.util import schema
from fttrain.util.errors import UserError
from fttrain.util.paths import conf_folder

# Groups that choose settings and are no settings of a run themselves
HOW_CHOSEN = ("experiment", "sweep")


def groups() -> dict[str, list[str]]:
    """The options of each configuration group: names of the files in ``conf/GROUP/``."""
    folders = sorted(path for path in conf_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def option_of(group: str, option: str) -> str:
    """The name by which Hydra finds ``option`` of ``group``; of an experiment or a sweep it may be
    the path of a file. Raises UserError, with the options and the nearest, where there is none.
    """
    options = groups()[group]
    if option in options or (group == "experiment" and option == "null"):
        return option
    if group in HOW_CHOSEN and is_path(option):
        return _load_file(group, option)
    near = schema.nearest(option, options)
    advice = f"did you mean {near}? " if near else ""
    paths = ", or the path of a .yaml file" if group in HOW_CHOSEN else ""
    raise UserError(
        f"{group}={option}: no such option; {advice}There are: {', '.join(options)}{paths}"
    )


def is_path(option: str) -> bool:
    """Whether an option is the path of a file."""
    return option.endswith((".yaml", ".yml")) or "/" in option


def _load_file(group: str, text: str) -> str:
    """Register the file with Hydra as an option of ``group``, and return its name there."""
    content = read_option_file(group, text)
    path = Path(text).expanduser()
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    ConfigStore.instance().store(name, content, group, package="_global_")
    return name


def read_option_file(group: str, text: str) -> dict[str, Any]:
    """The content of an option that is given as a file.

    Raises UserError where it is no file, no YAML or no group of keys, and for settings of Hydra
    outside the search of a sweep.
    """
    path, what = Path(text).expanduser(), f"{group}={text}"
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))  # refuses keys that come twice
    except FileNotFoundError:
        raise UserError(f"{what}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: cannot be read ({error})") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{what}: not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{what}: wanted is a group of keys")
    named = {str(key): value for key, value in content.items()}
    if group != "sweep" and any(key.startswith(("hydra", "sweep")) for key in named):
        raise UserError(f"{what}: a search belongs into a file of its own, for `-m sweep=FILE`")
    return named


def one_line(error: Exception) -> str:
    """A library's error message, without its line breaks."""
    return " ".join(str(error).split())
