"""The schema of settings: frozen dataclasses built from plain values, with an error of one line.

Values come from YAML or a command line, so the rules are those that people expect there: ``1e-4``
is a number even where YAML reads it as a string, ``1`` is fine for a fraction, a list becomes a
tuple. Nothing else is converted.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fttrain.util.errors import UserError

T = TypeVar("T")
_NO = object()  # stands for a value that does not fit


def build(cls: type[T], values: Any, prefix: str = "") -> T:
    """An instance of the dataclass ``cls`` from ``values``; nested dataclasses from nested
    mappings.

    ``prefix`` is the dotted path of ``cls`` in the whole configuration. Raises UserError for an
    unknown key (with the nearest one), a missing key, a value of the wrong type, and where
    ``__post_init__`` of the dataclass does.
    """
    if not isinstance(values, Mapping):
        keys, name = ", ".join(keys_of(cls)), prefix or "configuration"
        raise UserError(f"{name}={values!r}: wanted is a group of keys: {keys}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise unknown_key(_join(prefix, str(key)), cls)
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = _join(prefix, field.name)
        if field.name not in values:
            if (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                raise UserError(f"{name} is missing: {describe(hints[field.name])}")
        elif dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = build(hints[field.name], values[field.name], name)  # type: ignore[arg-type]
        else:
            arguments[field.name] = convert(hints[field.name], values[field.name], name)
    return cls(**arguments)


def convert(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the type ``hint``. Raises UserError with ``name``, the value and the type."""
    result = _fit(hint, value)
    if result is _NO:
        shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
        raise UserError(f"{name}={shown}: {describe(hint)} is wanted")
    return result


def lookup(cls: type, path: list[str]) -> Any:
    """The type of the dotted ``path`` below the dataclass ``cls``. Raises UserError, with the
    nearest key, where there is none.
    """
    hint: Any = cls
    for depth, part in enumerate(path):
        if not dataclasses.is_dataclass(hint):
            raise UserError(
                f"{'.'.join(path)}: {'.'.join(path[:depth])} is a single value, it has no keys"
            )
        hints = typing.get_type_hints(hint)
        if part not in hints:
            raise unknown_key(".".join(path), typing.cast(type, hint), depth)
        hint = hints[part]
    return hint


def unknown_key(name: str, cls: type, depth: int | None = None) -> UserError:
    """The error for the dotted ``name`` whose part at ``depth`` (the last by default) is no key of
    ``cls``.
    """
    parts = name.split(".")
    depth = len(parts) - 1 if depth is None else depth
    bad = parts[depth]
    if bad.startswith("_") and bad.endswith("_"):
        return UserError(
            f"{name}: refused: settings never name code to run (no _target_ and the like)"
        )
    keys = keys_of(cls)
    near = nearest(bad, keys)
    meant = ".".join([*parts[:depth], near or "", *parts[depth + 1 :]])
    advice = f"did you mean {meant}?" if near else f"allowed: {', '.join(keys)}"
    return UserError(f"{name}: no such key; {advice}")


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The most similar of ``words``; None where none is similar."""
    lower = {candidate.lower(): candidate for candidate in words}
    matches = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return lower[matches[0]] if matches else None


def keys_of(cls: type) -> list[str]:
    """The field names of a dataclass."""
    return [field.name for field in dataclasses.fields(cls)]


def describe(hint: Any) -> str:
    """A type in words."""
    simple = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    if hint in simple:
        return simple[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list [{describe(arguments[0])}, ...]"
        return f"a list of {len(arguments)} [{', '.join(describe(a) for a in arguments)}]"
    return " or ".join(describe(argument) for argument in arguments)


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _fit(hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint``; ``_NO`` where it does not fit."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        fits = (_fit(argument, value) for argument in _exact_first(hint, value))
        return next((result for result in fits if result is not _NO), _NO)
    if origin is tuple:
        return _fit_tuple(typing.get_args(hint), value)
    if hint is float:
        return _fit_float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # max_steps=1e3
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # output=2024
    # bool is a subclass of int, so isinstance would not do
    return value if type(value) is hint else _NO


def _exact_first(hint: Any, value: Any) -> list[Any]:
    return sorted(typing.get_args(hint), key=lambda argument: type(value) is not argument)


def _fit_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _NO
    try:
        number = float(value)  # strings as well: PyYAML reads 1e-4 as one
    except (ValueError, OverflowError):
        return _NO
    return _NO if math.isnan(number) else number  # no setting may be NaN


def _fit_tuple(arguments: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return _NO
    hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(hints) != len(value):
        return _NO
    items = [_fit(hint, item) for hint, item in zip(hints, value, strict=True)]
    return _NO if any(item is _NO for item in items) else tuple(items)
