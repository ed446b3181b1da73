"""A slower link between host and card: every copy of a side stream takes as long as it would there.

Each way is paced for itself, and all side streams that copy that way share it: one copy after the
other, in the order in which they are asked for. On the CPU there is one way, from host to host.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

import fttrain.strategy.builder  # noqa: F401  (so that all who copy are imported)
from fttrain.store import side_stream

Copy = Callable[[Tensor, Tensor], None]  # (into, source)
GB = 1e9


class Way(Protocol):
    """One way of the link."""

    carried_bytes: int

    def carry(self, into: Tensor, source: Tensor) -> None:
        """The copy, and what is missing of its time."""
        ...


class HostWay:
    """On the CPU: the side stream's thread sleeps."""

    def __init__(self, rate: float, copy: Copy) -> None:
        """``rate``: bytes/s."""
        self._rate, self._copy = rate, copy
        self._lock = threading.Lock()
        self.carried_bytes = 0

    def carry(self, into: Tensor, source: Tensor) -> None:
        with self._lock:
            began = time.perf_counter()
            self._copy(into, source)
            taken_s = time.perf_counter() - began
            time.sleep(max(0.0, into.nbytes / self._rate - taken_s))
            self.carried_bytes += into.nbytes


class CardWay:
    """On CUDA: a kernel that only waits follows each copy on its side stream's stream. The host
    never waits.
    """

    def __init__(self, rate: float, own_rate: float, cycles_per_s: float, copy: Copy) -> None:
        """``rate``, ``own_rate``: bytes/s, asked for and without a limit."""
        self._cycles_per_byte = cycles_per_s * max(0.0, 1 / rate - 1 / own_rate)
        self._copy = copy
        self._lock = threading.Lock()
        self._over: torch.cuda.Event | None = None  # the last copy this way, its wait included
        self.carried_bytes = 0

    def carry(self, into: Tensor, source: Tensor) -> None:
        device = into.device if into.is_cuda else source.device
        stream = torch.cuda.current_stream(device)
        # All that a copy waits for was asked for before it, here as on its side stream: no circle.
        with self._lock, torch.cuda.device(device):
            if self._over is not None:
                stream.wait_event(self._over)
            self._copy(into, source)
            torch.cuda._sleep(round(into.nbytes * self._cycles_per_byte))
            self._over = torch.cuda.Event()
            self._over.record(stream)
            self.carried_bytes += into.nbytes


@contextmanager
def paced(settings: dict[str, Any] | None) -> Iterator[dict[str, Way]]:
    """Inside the block the copies of all side streams take their time: ``gb_s`` of ``settings``
    each way, for the ways that ``own_gb_s`` has the rates of; ``cycles_per_s``: of a waiting
    kernel. None: as they are. The ways, by name.
    """
    if settings is None:
        yield {}
        return
    plain = side_stream.copy
    ways = {name: _way(name, settings, plain) for name in settings["own_gb_s"]}

    def copy(into: Tensor, source: Tensor) -> None:
        way = ways.get(direction(into, source))
        (plain if way is None else way.carry)(into, source)

    # Whoever copies has the function under a name of its own.
    modules = [module for module in list(sys.modules.values()) if _has(module, plain)]
    for module in modules:
        module.copy = copy  # type: ignore[attr-defined]
    try:
        yield ways
    finally:
        for module in modules:
            module.copy = plain  # type: ignore[attr-defined]


def direction(into: Tensor, source: Tensor) -> str:
    """Such as ``host to card``."""
    return " to ".join("card" if tensor.is_cuda else "host" for tensor in (source, into))


def _way(name: str, settings: dict[str, Any], plain: Copy) -> Way:
    rate = settings["gb_s"] * GB
    if "card" not in name:
        return HostWay(rate, plain)
    return CardWay(rate, settings["own_gb_s"][name] * GB, settings["cycles_per_s"], plain)


def _has(module: Any, copy: Copy) -> bool:
    name = getattr(module, "__name__", "")
    return name.startswith("fttrain.") and getattr(module, "copy", None) is copy
