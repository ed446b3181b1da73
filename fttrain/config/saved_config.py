"""The settings of a run that exists, as its config.yaml holds them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from fttrain.config.run_config import RunConfig, compose
from fttrain.util import schema
from fttrain.util.errors import UserError

FILE = "config.yaml"  # in the folder of the run


def load_run_config(output: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of the run in the folder ``output``, changed by ``overrides`` (``key=value`` or
    ``group=option``); ``launch`` and ``rig`` are those of this process and not the run's.

    Raises UserError where no run is there, or for an override that is wrong.
    """
    settings = [f"output={output}", *overrides]
    return with_saved(compose(settings), settings)


def with_saved(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The settings of the run in ``config.output``; a group that ``overrides`` name, or one key of
    it, is taken from ``config``. Raises UserError where no run is there.
    """
    file = Path(config.output) / FILE
    if not file.is_file():
        raise UserError(f"output={config.output}: no run is there (config.yaml is missing)")
    saved = schema.build(RunConfig, yaml.safe_load(file.read_text()))
    changed = {name: getattr(config, name) for name in ("output", "launch", "rig")}
    named = [override.lstrip("+").partition("=")[0].partition(".") for override in overrides]
    for group, _, key in sorted(named):  # a whole group before its keys
        if not hasattr(saved, group):
            raise UserError(f"{group}: evaluate takes the settings of the run, and single changes")
        value = getattr(config, group)
        if key:
            before = changed.get(group, getattr(saved, group))
            value = dataclasses.replace(before, **{key: getattr(value, key)})
        changed[group] = value
    return dataclasses.replace(saved, **changed)
