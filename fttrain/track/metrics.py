"""metrics.jsonl: one line of strict JSON for each step, whatever happens to the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fttrain.track.base import Tracker, plain
from fttrain.util.atomic_files import replace, write_bytes
from fttrain.util.errors import UserError
from fttrain.util.warn import Warn, warn


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, by step. A killed run may have left a part of a line.

    A missing file gives no lines. Lines of one step (training, then evaluation) are joined.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in raw.split(b"\n"):
        try:
            values = json.loads(line)
            by_step.setdefault(int(values["step"]), {}).update(values)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # half a line, or zeros that a power cut left
    return [by_step[step] for step in sorted(by_step)]


class MetricsFile(Tracker):
    """The writer of metrics.jsonl. A full disk costs one warning, not the run."""

    def __init__(self, path: Path | str, resumed_step: int = 0, warn: Warn = warn) -> None:
        """Open ``path`` and drop lines past ``resumed_step``: these steps run again.

        Raises UserError where the file cannot be written.
        """
        self._path, self._warn = Path(path), warn
        self._warned = self._torn = False
        earlier = [line for line in read_metrics(path) if line["step"] <= resumed_step]
        text = "".join(f"{json.dumps(line)}\n" for line in earlier)
        try:
            replace(self._path, lambda part: write_bytes(part, text.encode()))
            # Unbuffered: each line is one write, so a kill can tear at most the last one.
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line: ``step`` and the numbers; NaN and infinity become null."""
        line = json.dumps({"step": step, **plain(values)}, allow_nan=False).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        try:
            self._torn = self._file.write(line) != len(line)
        except OSError as error:
            self._torn = True
            if not self._warned:
                self._warn(f"{self._path} cannot be written ({error.strerror}): lines are missing")
            self._warned = True

    def finish(self, exit_code: int = 0) -> None:
        """Close the file."""
        self._file.close()
