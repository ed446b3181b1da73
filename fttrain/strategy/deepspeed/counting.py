"""Counts of the bytes that DeepSpeed hands to collectives."""

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Methods of DeepSpeed's backend: collectives that sum, and those that gather into their first
# argument
SUMS = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter", "all_reduce_coalesced")
GATHERS = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")


@dataclass(frozen=True)
class CountedTraffic:
    """The rank's collective traffic since the last ``take``."""

    sum_bytes: int = 0  # payload handed to sums
    sum_s: float = 0.0  # seconds in sums that the host waits for
    gather_bytes: int = 0  # received from other ranks


class CountedBackend:
    """DeepSpeed's communication backend with counters."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._traffic = CountedTraffic()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._backend, name)
        if name in SUMS:
            return lambda *args, **kwargs: self._sum(attribute, args, kwargs)
        if name in GATHERS:
            return lambda *args, **kwargs: self._gather(attribute, args, kwargs)
        return attribute

    def take(self) -> CountedTraffic:
        """The traffic since the last call."""
        taken, self._traffic = self._traffic, CountedTraffic()
        return taken

    def _sum(self, collective: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size_bytes = max(map(_bytes, [*args, *kwargs.values()]), default=0)
        started = time.perf_counter()
        result = collective(*args, **kwargs)
        took_s = 0.0 if kwargs.get("async_op") else time.perf_counter() - started
        before = self._traffic
        self._traffic = CountedTraffic(
            before.sum_bytes + size_bytes, before.sum_s + took_s, before.gather_bytes
        )
        return result

    def _gather(self, collective: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The largest argument is the whole tensor, the next one this rank's shard.
        sizes = sorted(map(_bytes, [*args, *kwargs.values()]))
        before = self._traffic
        self._traffic = CountedTraffic(
            before.sum_bytes, before.sum_s, before.gather_bytes + sizes[-1] - sizes[-2]
        )
        return collective(*args, **kwargs)


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0
