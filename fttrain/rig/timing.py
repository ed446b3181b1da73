"""Timing of work on a device: by CUDA events on CUDA, by the host's clock on the CPU."""

import statistics
import time
from collections.abc import Callable

import torch

LEAST, MOST = 3, 20  # repetitions of a median
WARM_UP_S = 0.2  # of a card: from its idle clocks to its working clocks


def elapsed_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds from the call of ``work`` to the end of what it launched on the current stream.

    Work launched earlier is awaited first, so the time is that of ``work`` alone.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def repetitions(once_s: float, budget_s: float) -> int:
    """Repetitions in ``budget_s`` of work that takes ``once_s``: ``LEAST`` to ``MOST``."""
    return max(LEAST, min(MOST, int(budget_s / max(once_s, 1e-9))))


def median_s(work: Callable[[], object], device: torch.device, budget_s: float = 0.5) -> float:
    """The median of some repetitions, after one that is not counted (on CUDA several)."""
    once_s = elapsed_s(work, device)
    if device.type == "cuda":  # the first one starts libraries and loads kernels
        began = time.perf_counter()
        once_s = elapsed_s(work, device)
        while time.perf_counter() - began < WARM_UP_S:
            once_s = elapsed_s(work, device)
    times = [elapsed_s(work, device) for _ in range(repetitions(once_s, budget_s))]
    return statistics.median(times)
