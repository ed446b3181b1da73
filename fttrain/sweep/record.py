"""``trial.json``: the settings and the state of a trial; and the name of its folder."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fttrain.util.atomic_files import write_text

FILE = "trial.json"
FINISHED = ("done", "pruned")  # such a trial is not run again
NAME_LENGTH = 80  # characters


@dataclass
class Record:
    """The record of a trial, which the processes of a sweep exchange."""

    name: str  # of the trial's folder
    overrides: list[str]  # of this trial alone, without those of all trials
    settings: dict[str, Any] = field(default_factory=dict)  # of the run, see ``identity``
    choices: dict[str, str] = field(default_factory=dict)  # group -> option
    # running (also: killed together with its sweep) | interrupted: by the user, after a snapshot |
    # done | pruned | failed
    state: str = "running"
    value: float | None = None  # of the objective; the last known one of a pruned trial
    reason: str = ""  # of the failure, or the step of pruning
    exit_code: int | None = None
    spans: list[list[float]] = field(default_factory=list)  # [start, end] of each attempt, epoch s
    total_steps: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in a trial's folder; None where it is missing or damaged."""
        try:
            return cls(**json.loads((folder / FILE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write the file, with one atomic replace."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @property
    def seconds(self) -> float:
        """Seconds of all attempts; an attempt without a recorded end counts none."""
        return sum(span[1] - span[0] for span in self.spans if len(span) == 2)


def records(sweep_folder: Path) -> list[Record]:
    """All trials that a sweep's folder holds, in the order in which they were first started."""
    read = [Record.read(path.parent) for path in sweep_folder.glob(f"*/{FILE}")]
    known = [record for record in read if record is not None]
    return sorted(known, key=lambda record: (record.spans[:1], record.name))


def trial_name(overrides: Iterable[str]) -> str:
    """The name of a trial's folder, from its overrides, such as ``lora.r=8_optim.lr=0.0001``.

    A name that cannot show the overrides in full ends with a digest of them.
    """
    exact = [text.lstrip("+") for text in overrides]
    parts = [_shown(text) for text in exact]
    name = "_".join(re.sub(r"[^A-Za-z0-9._=+-]+", "-", part).strip("-.") for part in parts)
    if len(name) > NAME_LENGTH or name != "_".join(_unquoted(text) for text in exact):
        digest = hashlib.sha256("\0".join(exact).encode()).hexdigest()[:8]
        name = f"{name[:NAME_LENGTH]}-{digest}"
    return name


def value_of(override: str) -> str:
    """The value in ``key=value``, without quotes."""
    return _unquoted(override).partition("=")[2]


def keys_of(trials: Sequence[Record]) -> list[str]:
    """The settings that differ between trials, in the order of their first mention."""
    names = [text.partition("=")[0] for record in trials for text in record.overrides]
    return list(dict.fromkeys(names))


def _unquoted(override: str) -> str:
    key, equals, value = override.partition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return f"{key}{equals}{value}"


def _shown(override: str) -> str:
    """``override`` without quotes; a number has six digits at most."""
    key, equals, value = _unquoted(override).partition("=")
    try:
        short = f"{float(value):.6g}" if "." in value or "e" in value else value
    except ValueError:
        short = value
    return f"{key}{equals}{short if len(short) < len(value) else value}"
