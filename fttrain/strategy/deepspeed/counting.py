"""Counts what DeepSpeed hands to collectives."""

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# DeepSpeed's backend: collectives that sum, and those that gather into their first argument
SUMS = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter", "all_reduce_coalesced")
GATHERS = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")


@dataclass(frozen=True)
class Moved:
    """Of this rank, since the last time."""

    sum_bytes: int = 0  # payload handed to sums
    sum_s: float = 0.0  # in those that the host waits for
    gather_bytes: int = 0  # received from other ranks


class CountedBackend:
    """DeepSpeed's communication backend, the same in all but that it counts."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._moved = Moved()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name in SUMS:
            return lambda *given, **named: self._sum(found, given, named)
        if name in GATHERS:
            return lambda *given, **named: self._gather(found, given, named)
        return found

    def take(self) -> Moved:
        """What was moved since the last call."""
        taken, self._moved = self._moved, Moved()
        return taken

    def _sum(self, collective: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        size_bytes = max(map(_bytes, [*given, *named.values()]), default=0)
        started = time.perf_counter()
        result = collective(*given, **named)
        took_s = 0.0 if named.get("async_op") else time.perf_counter() - started
        before = self._moved
        self._moved = Moved(
            before.sum_bytes + size_bytes, before.sum_s + took_s, before.gather_bytes
        )
        return result

    def _gather(self, collective: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        sizes = sorted(map(_bytes, [*given, *named.values()]))  # last: all; before it: this rank's
        before = self._moved
        self._moved = Moved(
            before.sum_bytes, before.sum_s, before.gather_bytes + sizes[-1] - sizes[-2]
        )
        return collective(*given, **named)


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0
