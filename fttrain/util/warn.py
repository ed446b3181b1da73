"""Warnings to the user: one line each on stderr."""

import os
import sys
from collections.abc import Callable

from fttrain.util.redact import redact

Warn = Callable[[str], None]


def warn(message: str) -> None:
    """Print ``warning: message`` as one line on stderr, secrets redacted.

    Rank 0 of a run prints, or the only process; other ranks stay silent.
    """
    if _rank() == "0":
        _print(message)


def warn_of_rank(message: str) -> None:
    """Print a warning as ``warn`` does, on whichever rank calls it: the fact concerns this rank
    alone. Ranks other than 0 name themselves.
    """
    rank = _rank()
    _print(message if rank == "0" else f"rank {rank}: {message}")


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _print(message: str) -> None:
    print(f"warning: {redact(' '.join(message.split()))}", file=sys.stderr, flush=True)
