"""Reduction of adapter gradients: one fp32 collective a layer, during backward of other layers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fttrain.distributed.collectives import Handle, HandleGroup, all_reduce, reduce_scatter
from fttrain.distributed.rank_group import RankGroup

_Span = tuple[torch.cuda.Event, torch.cuda.Event]  # begin, end


@dataclass
class SyncStats:
    """One step's gradient traffic of this rank."""

    sync_bytes: int = 0  # payload of the collectives
    sync_s: float = 0.0  # time the link was busy with them; on CUDA in the previous step
    wait_s: float = 0.0  # time the compute waited for them; on CUDA in the previous step

    @property
    def sync_gb_per_s(self) -> float:
        """Algorithm bandwidth in GB/s (1e9): payload over busy time."""
        return self.sync_bytes / self.sync_s / 1e9 if self.sync_s else 0.0


class GradientSync(Protocol):
    """Reduction (sum) of complete gradients over the ranks that hold the same layers."""

    def launch(self, gradient: Tensor) -> Handle:
        """Start the reduction of ``gradient`` fp32 (values,), in place: all of it, or this rank's
        shard.
        """
        ...

    def wait(self) -> SyncStats:
        """Wait for every launched reduction. On CUDA the compute that follows is ordered after
        them.
        """
        ...


class NoSync:
    """No reduction, for a rank that alone holds its layers."""

    def launch(self, gradient: Tensor) -> Handle:
        return HandleGroup(())

    def wait(self) -> SyncStats:
        return SyncStats()


class CollectiveSync:
    """Reduction by one collective a layer, launched as the layer's last backward ends."""

    def __init__(self, group: RankGroup, collective: Callable[[Tensor], Handle]) -> None:
        on_card = group.device.type == "cuda"
        self._timer = _CudaTimer(collective) if on_card else _HostTimer(collective)
        self._sync_bytes = 0

    def launch(self, gradient: Tensor) -> Handle:
        self._sync_bytes += gradient.numel() * gradient.element_size()
        return self._timer.launch(gradient)

    def wait(self) -> SyncStats:
        stats = SyncStats(self._sync_bytes, *self._timer.wait())
        self._sync_bytes = 0
        return stats


def gradient_sync(group: RankGroup, sharded: bool = False) -> GradientSync:
    """The reduction over all ranks of ``group``. ``sharded``: each rank needs its shard of the sum
    alone (a reduce_scatter, over all ranks of the run).
    """
    if group.world_size == 1:
        return NoSync()
    if sharded:
        return CollectiveSync(group, reduce_scatter)
    return CollectiveSync(group, partial(all_reduce, group=group.process_group))


class _HostTimer:
    """Times of gloo's collectives: a callback on gloo's thread takes the end of each."""

    def __init__(self, collective: Callable[[Tensor], Any]) -> None:
        self._collective = collective
        self._launched: list[tuple[float, torch_dist.Work, torch.futures.Future[float]]] = []

    def launch(self, gradient: Tensor) -> Handle:
        work: torch_dist.Work = self._collective(gradient)
        done = work.get_future().then(lambda _: time.perf_counter())
        self._launched.append((time.perf_counter(), work, done))
        return work

    def wait(self) -> tuple[float, float]:
        """Wait for all. Return the seconds in which at least one collective was under way, and the
        seconds of this wait.
        """
        called, busy_s, busy_until = time.perf_counter(), 0.0, 0.0
        for started, work, done in self._launched:
            work.wait()
            ended = done.wait()
            busy_s += max(0.0, ended - max(started, busy_until))
            busy_until = max(busy_until, ended)
        self._launched = []
        return busy_s, time.perf_counter() - called


class _CudaTimer:
    """Times of NCCL's collectives: events on a side stream around each. The compute stream waits
    for the last one; the host never waits.

    Times are those of the previous step: reading this step's events would wait for the device.
    """

    def __init__(self, collective: Callable[[Tensor], Handle]) -> None:
        self._collective = collective
        self._stream: torch.cuda.Stream | None = None
        # (this step, the previous one): events around each collective, and around the compute's
        # wait for all of them
        self._busy: tuple[list[_Span], list[_Span]] = [], []
        self._waits: tuple[list[_Span], list[_Span]] = [], []

    def launch(self, gradient: Tensor) -> Handle:
        if self._stream is None:
            self._stream = torch.cuda.Stream(gradient.device)
        self._stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with torch.cuda.stream(self._stream):
            begin, end = _span()
            begin.record()
            self._collective(gradient).wait()  # orders the side stream; the host goes on
            end.record()
        self._busy[0].append((begin, end))
        return _EventHandle(end)

    def wait(self) -> tuple[float, float]:
        """Order the compute after all. Return the seconds of the previous step's collectives, and
        of the compute's wait for them.
        """
        if self._stream is not None:
            compute, (begin, end) = torch.cuda.current_stream(self._stream.device), _span()
            begin.record(compute)
            compute.wait_stream(self._stream)
            end.record(compute)
            self._waits[0].append((begin, end))
        seconds = _seconds(self._busy[1]), _seconds(self._waits[1])
        self._busy, self._waits = ([], self._busy[0]), ([], self._waits[0])
        return seconds


def _span() -> _Span:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _seconds(spans: list[_Span]) -> float:
    """The sum over all spans that are over."""
    return sum(begin.elapsed_time(end) for begin, end in spans if end.query()) / 1e3


class _EventHandle:
    """A CUDA event: ``wait`` orders the caller's current stream after it."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.wait()
