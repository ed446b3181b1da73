"""The command line of a sweep: settings of all trials, and axes, the settings that differ."""

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from fttrain.config.groups import groups, is_path, one_line, option_of, read_option_file
from fttrain.config.run_config import RunConfig, is_text, quoted, split_override
from fttrain.sweep.config import SweepConfig
from fttrain.util import schema
from fttrain.util.errors import UserError
from fttrain.util.redact import is_secret, redact

# Hydra's own keys that a sweep may set; everything else of Hydra would name files or code.
HYDRA_GROUPS = ("hydra/sweeper", "hydra/sweeper/sampler", "hydra/launcher")
HYDRA_KEYS = ("hydra.sweeper.", "hydra.launcher.")
NAMES_CODE = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_", "custom_search_space")
NOT_AXES = ("output", "resume", "dry_run", "track")  # alike in all trials
_BARE = re.compile(r"[A-Za-z_./][\w./-]*")  # text that Hydra's grammar needs no quotes for
_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(")


@dataclass
class Request:
    """The parts of a sweep's command line."""

    output: str | None = None  # the sweep's folder
    fixed: list[str] = field(default_factory=list)  # overrides of all trials
    axes: dict[str, "Axis"] = field(default_factory=dict)  # by key
    search: str | None = None  # option of the group `sweep`
    hydra: list[str] = field(default_factory=list)  # overrides of Hydra and of the sweep's settings


@dataclass(frozen=True)
class Axis:
    """A setting, or a group, that differs between trials."""

    key: str
    text: str  # the values in Hydra's grammar
    override: Override

    @property
    def discrete(self) -> bool:
        """Whether its values can be listed."""
        return bool(self.override.is_discrete_sweep())

    def values(self) -> list[str]:
        """``key=value`` of each value in Hydra's grammar; of an interval's two ends.

        Raises UserError for a range without a value.
        """
        value = self.override.value()
        if isinstance(value, IntervalSweep):
            texts = [str(value.start), str(value.end)]
        elif _is_glob(self.text):
            pattern = self.override.value()
            texts = [name for name in groups()[self.key] if _matches(pattern, name)]
        else:
            texts = list(self.override.sweep_string_iterator())
            if isinstance(value, RangeSweep) and not texts:
                raise UserError(f"{self.key}={self.text}: no value is in this range")
        return [f"{self.key}={text}" for text in dict.fromkeys(texts)]


def read(arguments: Iterable[str]) -> Request:
    """Parse the overrides of ``fttrain train -m``.

    Raises UserError, in one line, for the first invalid one.
    """
    request = Request()
    for text in arguments:
        key, _, value = text.partition("=")
        if key.lstrip("+").startswith("hydra"):
            request.hydra.append(_hydra(text))
        elif key == "sweep":
            request.search = _search(value)
        elif key.startswith("sweep."):
            request.hydra.append(_sweep_setting(key, value))
        else:
            _add(request, text)
    return request


def add_searched(request: Request, params: Mapping[str, object]) -> None:
    """Add the axes of a search's file, ``hydra.sweeper.params``. The command line wins."""
    given = {text.lstrip("+").partition("=")[0] for text in request.fixed} | set(request.axes)
    for key, value in params.items():
        if key not in given:
            _add(request, f"{key}={value}")


def combinations(axes: Mapping[str, Axis]) -> list[list[str]]:
    """All combinations of the values, the last axis changing fastest."""
    return [list(texts) for texts in itertools.product(*(axis.values() for axis in axes.values()))]


def _add(request: Request, text: str) -> None:
    key, value = split_override(text)
    axis = _axis(key, value)
    request.axes.pop(key, None)  # the last override of a key counts
    if axis is not None:
        if key.partition(".")[0] in NOT_AXES:
            raise UserError(f"{key}={value}: one value is wanted: trials cannot differ in it")
        request.axes[key] = axis
        for fixed in [item for item in request.fixed if item.lstrip("+").startswith(f"{key}=")]:
            request.fixed.remove(fixed)
    elif key == "output":
        request.output = value
    elif key in ("resume", "dry_run"):
        raise UserError(f"{key}={value}: not of a sweep, whose trials always go on where they were")
    elif key == "experiment" and is_path(value):
        option_of(key, value)  # refuses a wrong path as it was typed, before any trial starts
        request.fixed.append(f"{key}={os.path.abspath(os.path.expanduser(value))}")
    else:
        request.fixed.append(text)


def _axis(key: str, value: str) -> Axis | None:
    """The axis that ``key=value`` lists; None for a single value."""
    text_key = key not in groups() and is_text(key)
    plain_text = text_key and not _FUNCTION.match(value)
    if plain_text and ("," not in value or _is_quoted(value)):
        return None
    if plain_text and not set(value) & set("'\"[]{}()"):
        value = ",".join(_listed(element.strip()) for element in value.split(","))
    override = _parsed(key, value)
    if not override.is_sweep_override():
        return None
    axis = Axis(key, value, override)
    interval = override.value()
    if isinstance(interval, IntervalSweep) and isinstance(interval.start, float) and _is_whole(key):
        raise UserError(f"{key}={value}: whole numbers are wanted: write int(interval(1,64))")
    if key in groups():
        for choice in axis.values():
            _refuse_path(key, choice.partition("=")[2])
            option_of(key, choice.partition("=")[2])
        if not axis.values():
            raise UserError(f"{key}={value}: there are only {', '.join(groups()[key])}")
    elif _is_glob(value):
        raise UserError(f"{key}={value}: glob is of groups; `fttrain train --help` lists them")
    return axis


def _is_whole(key: str) -> bool:
    return key not in groups() and schema.lookup(RunConfig, key.split(".")) in (int, int | None)


def _refuse_path(group: str, option: str) -> None:
    if is_path(option):
        raise UserError(
            f"{group}={option}: a file cannot be one of several; put the values that differ on the "
            "command line"
        )


def _listed(element: str) -> str:
    return element if _BARE.fullmatch(element) and element != "null" else quoted(element)


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] in "'\"" and value.find(value[0], 1) == len(value) - 1


def _is_glob(value: str) -> bool:
    return value.startswith("glob(")


def _matches(pattern: object, name: str) -> bool:
    return bool(pattern.filter([name]))  # type: ignore[attr-defined]


def _hydra(text: str) -> str:
    """Return ``text``, an override of Hydra itself; UserError where a sweep may not set it."""
    key, equals, value = text.partition("=")
    bare = key.lstrip("+")
    if is_secret(bare, value):
        raise UserError(f"{redact(bare)}: secrets do not belong on a command line")
    allowed = bare in HYDRA_GROUPS or bare.startswith(HYDRA_KEYS)
    if not equals or not allowed or set(bare.split(".")) & set(NAMES_CODE):
        raise UserError(
            f"{text!r}: of Hydra a sweep takes {', '.join(HYDRA_GROUPS)}, hydra.sweeper.KEY and "
            "hydra.launcher.KEY; nothing that names code (_target_ and the like)"
        )
    if _parsed(bare, value).is_sweep_override():
        raise UserError(f"{text}: one value is wanted")
    return text


def _parsed(key: str, value: str) -> Override:
    try:
        return OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise UserError(f"{key}={value}: cannot be read: {one_line(error)}") from None


@dataclass(frozen=True)
class _Root:
    sweep: SweepConfig


def _sweep_setting(key: str, value: str) -> str:
    """A setting of the sweep itself, in the form that Hydra reads."""
    schema.lookup(_Root, key.split("."))
    if _parsed(key, value).is_sweep_override():
        raise UserError(f"{key}={value}: one value is wanted")
    return f"++{key}={value}"


def _search(option: str) -> str:
    """The name by which Hydra loads the search ``option``.

    Raises UserError where there is none, or where it sets settings of the run or names code.
    """
    name = option_of("sweep", option)
    if is_path(option):
        content = read_option_file("sweep", option)
        for key in content:
            if key not in ("defaults", "hydra", "sweep"):
                raise UserError(
                    f"sweep={option}: {key}: a search has hydra.sweeper, hydra.launcher and sweep; "
                    "settings of the run belong into an experiment or on the command line"
                )
        for entry in content.get("defaults") or []:
            if entry != "_self_" and not all("/hydra/" in str(key) for key in entry):
                raise UserError(f"sweep={option}: defaults: {entry}: only override /hydra/...")
        _refuse_code(f"sweep={option}", content.get("hydra") or {})
    return name


def _refuse_code(label: str, hydra: object) -> None:
    if not isinstance(hydra, Mapping) or not set(hydra) <= {"sweeper", "launcher"}:
        raise UserError(f"{label}: of hydra it may set sweeper and launcher")
    pending: list[object] = [hydra]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            if named := set(node) & set(NAMES_CODE):
                raise UserError(f"{label}: {min(named)}: refused: settings never name code to run")
            pending += node.values()


def describe(axes: Mapping[str, Axis]) -> str:
    """The axes as they were given."""
    return " ".join(f"{axis.key}={axis.text}" for axis in axes.values())
