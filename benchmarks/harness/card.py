"""What benchmarks of kernels on a card share: whether there is one, sides in turns, memory."""

import importlib.metadata
import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import common
import torch

from fttrain.plan.live_bytes import LiveBytes
from fttrain.rig.timing import elapsed_s

Work = Callable[[], object]
PACKAGES = {"triton": "triton", "liger_kernel": "liger-kernel", "cut_cross_entropy": None}


def required(script: str) -> torch.device:
    """The card; where there is none, a line and exit code 1."""
    if not torch.cuda.is_available():
        print(f"{script}: nothing was measured: no CUDA device", file=sys.stderr)
        raise SystemExit(1)
    return torch.device("cuda", torch.cuda.current_device())


def environment(device: torch.device) -> dict[str, Any]:
    """As ``common.environment``, with the card and the versions of kernels that are installed."""
    found = common.environment()
    found["card"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module):
            name = package or module
            found["versions"][name] = importlib.metadata.version(name)
    return found


def in_turns(
    sides: Mapping[str, Work],
    device: torch.device,
    turns: int,
    calls: int,
    before: Callable[[str], object] = lambda side: None,
) -> dict[str, list[float]]:
    """Seconds of a call of each side, by turn, in which side comes after side, after one that does
    not count. A turn is the mean of ``calls``, so that launches run ahead as they do in a step.

    ``before``: called with the side's name ahead of each of its turns.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns + 1):
        for side, work in sides.items():
            before(side)
            took_s = elapsed_s(lambda work=work: [work() for _ in range(calls)], device) / calls
            if turn:
                seconds[side].append(took_s)
    return seconds


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most that ``work`` has at once beside what was there before."""
    if device.type != "cuda":
        with LiveBytes() as live:
            work()
        return live.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast as ``ours`` ``theirs`` are, the median of the turns' ratios."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
