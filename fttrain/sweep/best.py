"""The best trial as an experiment: ``fttrain train experiment=SWEEP/experiment/best.yaml``."""

import functools
from typing import Any

import yaml

from fttrain.config.run_config import compose_values
from fttrain.sweep.config import Sweep
from fttrain.sweep.objective import OBJECTIVES
from fttrain.sweep.record import Record
from fttrain.sweep.trial import NOT_SEARCHED, composing
from fttrain.util.atomic_files import write_text

FILE = "experiment/best.yaml"


def write_best(sweep: Sweep, record: Record) -> None:
    """Write the trial's group options, and each setting that differs from theirs.

    Secrets are redacted; the trial's folder is left out.
    """
    _, defaults = _given(())
    choices = {
        group: option
        for group, option in record.choices.items()
        if group not in NOT_SEARCHED and option != defaults.get(group)
    }
    given, _ = _given(tuple(f"{group}={option}" for group, option in choices.items()))
    content: dict[str, Any] = {}
    if choices:
        content["defaults"] = [{f"override /{group}": name} for group, name in choices.items()]
    content |= changed(given, record.settings)
    lines = [
        "# @package _global_",
        f"# The best trial of {sweep.folder.name}: {record.name}",
        f"# {OBJECTIVES[sweep.config.objective].label}: {record.value}",
        yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
    ]
    path = sweep.folder / FILE
    path.parent.mkdir(exist_ok=True)
    write_text(path, "\n".join(lines))


@functools.cache
def _given(options: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values and choices that group ``options`` alone compose to; the same for most trials."""
    with composing:
        return compose_values(options)


def changed(given: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``target`` that differ from ``given``, group by group."""
    changes: dict[str, Any] = {}
    for key, value in target.items():
        before = given.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := changed(before, value):
                changes[key] = inner
        elif key not in given or before != value:
            changes[key] = value
    return changes
