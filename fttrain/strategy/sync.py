"""How adapter gradients meet: one fp32 all_reduce a layer, while others still compute backward."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fttrain.collectives import Handle, Handles
from fttrain.dist import Group


@dataclass
class SyncStats:
    """One step's gradient traffic of this rank."""

    sync_bytes: int = 0  # payload handed to all_reduce
    sync_s: float = 0.0  # time the link was busy with it
    wait_s: float = 0.0  # time the rank waited for what had not come yet

    @property
    def sync_gb_per_s(self) -> float:
        """Algorithm bandwidth in GB/s (1e9): payload over busy time."""
        return self.sync_bytes / self.sync_s / 1e9 if self.sync_s else 0.0


class GradientSync(Protocol):
    """Sums complete gradients over the ranks that hold the same layers."""

    def launch(self, gradient: Tensor) -> Handle:
        """Start the sum of ``gradient`` fp32 (values,) in place."""
        ...

    def wait(self) -> SyncStats:
        """Until every launched sum is complete (on CUDA: ordered before what is launched next)."""
        ...


class NoSync:
    """A rank that holds its layers alone: there is nothing to sum."""

    def launch(self, gradient: Tensor) -> Handle:
        return Handles(())

    def wait(self) -> SyncStats:
        return SyncStats()


class AllReduceSync:
    """Launches a layer's all_reduce as its last backward ends; waits for all before the update."""

    def __init__(self, group: Group) -> None:
        self._timer = _CudaTimer() if group.device.type == "cuda" else _HostTimer()
        self._sync_bytes = 0

    def launch(self, gradient: Tensor) -> Handle:
        self._sync_bytes += gradient.numel() * gradient.element_size()
        return self._timer.launch(gradient)

    def wait(self) -> SyncStats:
        started = time.perf_counter()
        busy_s = self._timer.wait()
        stats = SyncStats(self._sync_bytes, busy_s, time.perf_counter() - started)
        self._sync_bytes = 0
        return stats


def gradient_sync(group: Group) -> GradientSync:
    """The sum over all ranks of ``group``."""
    return AllReduceSync(group) if group.world_size > 1 else NoSync()


class _HostTimer:
    """gloo: a callback stamps the end of each collective on gloo's own thread."""

    def __init__(self) -> None:
        self._launched: list[tuple[float, torch_dist.Work, torch.futures.Future[float]]] = []

    def launch(self, gradient: Tensor) -> Handle:
        work = torch_dist.all_reduce(gradient, async_op=True)
        assert work is not None
        done = work.get_future().then(lambda _: time.perf_counter())
        self._launched.append((time.perf_counter(), work, done))
        return work

    def wait(self) -> float:
        """Seconds in which at least one collective was under way."""
        busy_s, busy_until = 0.0, 0.0
        for started, work, done in self._launched:
            work.wait()
            ended = done.wait()
            busy_s += max(0.0, ended - max(started, busy_until))
            busy_until = max(busy_until, ended)
        self._launched = []
        return busy_s


class _CudaTimer:
    """NCCL: events on a side stream around each collective. The compute stream waits for the last;
    the host never does.

    Busy time is that of the step before: reading this step's events would wait for the device.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._last: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def launch(self, gradient: Tensor) -> Handle:
        if self._stream is None:
            self._stream = torch.cuda.Stream(gradient.device)
        self._stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with torch.cuda.stream(self._stream):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            torch_dist.all_reduce(gradient)
            end.record()
        self._events.append((begin, end))
        return _Ordered(end)

    def wait(self) -> float:
        """Seconds the collectives of the step before took."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        busy_s = sum(begin.elapsed_time(end) for begin, end in self._last if end.query()) / 1e3
        self._last, self._events = self._events, []
        return busy_s


class _Ordered:
    """Orders the current stream of whoever waits after an event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.wait()
