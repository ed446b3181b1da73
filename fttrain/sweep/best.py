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
    """Writes its group options, and each setting that is another one than they give; secrets are
    redacted, and where the trial was kept is left out.
    """
    _, usual = _given(())
    choices = {
        group: option
        for group, option in record.choices.items()
        if group not in NOT_SEARCHED and option != usual.get(group)
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
    """What options of groups alone make; the same for most trials."""
    with composing:
        return compose_values(options)


def changed(given: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """What has to be set to make ``wanted`` of ``given``, group by group."""
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        before = given.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := changed(before, value):
                found[key] = inner
        elif key not in given or before != value:
            found[key] = value
    return found
