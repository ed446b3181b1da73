"""Side streams: work that runs beside the compute, in order, without the host waiting for it.

A side stream is a side stream on CUDA. On the CPU it is a thread for copies, or the collective
library's own threads for collectives. ``run`` starts work, ``Handle.wait`` orders what the compute
does next after it, ``record_event`` names a moment in the compute that work can be ordered after.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from fttrain.distributed.collectives import Handle, HandleGroup

Task = Callable[[], Handle | None]  # issues copies or collectives; a handle if it does not wait
Event = Any  # a CUDA event; None on the CPU, where the compute is always up to date
_Wait = tuple[torch.cuda.Event, torch.cuda.Event]  # before and after a wait of the compute stream


class SideStream(Protocol):
    """Runs work beside the compute, in the order in which it was given."""

    def record_event(self) -> Event:
        """What the compute has been asked so far."""
        ...

    def run(self, work: Task, after: Event | None = None) -> Handle:
        """Start ``work`` once the compute has come to ``after``; None: to what it was asked so
        far.
        """
        ...

    def synchronize(self) -> None:
        """The host waits until all work is done."""
        ...

    def take_wait_s(self) -> float:
        """Seconds that the compute stood in ``wait`` since the last call. On CUDA those of waits
        that are already over: asking never waits for the device.
        """
        ...


class HostSideStream:
    """A side stream on the CPU: the compute is always up to date there, so marks mean nothing."""

    def __init__(self) -> None:
        self._under_way: list[_TimedHandle] = []  # not waited for so far
        self._wait_s = 0.0

    def record_event(self) -> Event:
        return None

    def run(self, work: Task, after: Event | None = None) -> Handle:
        started = _TimedHandle(self._start(work), self._waited)
        self._under_way = [ticket for ticket in self._under_way if not ticket.over] + [started]
        return started

    def synchronize(self) -> None:
        for ticket in self._under_way:
            ticket.wait()

    def take_wait_s(self) -> float:
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    def _start(self, work: Task) -> Callable[[], Any]:
        """Start ``work``; a function that returns once it is done."""
        raise NotImplementedError

    def _waited(self, seconds: float) -> None:
        self._wait_s += seconds


class ThreadSideStream(HostSideStream):
    """Copies on the CPU: one thread does them in order."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "side stream")

    def _start(self, work: Task) -> Callable[[], Any]:
        return self._thread.submit(_finish, work).result


class InlineSideStream(HostSideStream):
    """Copies on the CPU, each done before ``run`` returns."""

    def _start(self, work: Task) -> Callable[[], Any]:
        _finish(work)
        return lambda: None


class CollectiveSideStream(HostSideStream):
    """Collectives on the CPU: started by the caller, so that all ranks start them in one order, and
    carried on by the library's threads.
    """

    def _start(self, work: Task) -> Callable[[], Any]:
        return (work() or HandleGroup(())).wait


class CudaSideStream:
    """Copies or collectives on CUDA: a side stream. The host never waits for it but in
    ``synchronize``.
    """

    def __init__(self, device: torch.device, timed: bool) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Around each wait of the compute stream; read once they are over. None: not timed.
        self._waits: list[_Wait] | None = [] if timed else None

    def record_event(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def run(self, work: Task, after: Event | None = None) -> Handle:
        self._stream.wait_event(self.record_event() if after is None else after)
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            _finish(work)
            done.record(self._stream)
        return _StreamHandle(done, self._device, self._waits)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def take_wait_s(self) -> float:
        waits = self._waits or []
        over = next((i for i, (_, end) in enumerate(waits) if not end.query()), len(waits))
        wait_s = sum(begin.elapsed_time(end) for begin, end in waits[:over]) / 1e3
        del waits[:over]
        return wait_s


class _TimedHandle:
    """A wait of the host whose first call is timed; later ones find it over."""

    def __init__(self, wait: Callable[[], Any], waited: Callable[[float], None]) -> None:
        self._wait, self._waited = wait, waited
        self.over = False

    def wait(self) -> None:
        if self.over:
            return
        started = time.perf_counter()
        self._wait()
        self.over = True
        self._waited(time.perf_counter() - started)


class _StreamHandle:
    """An event that the stream of whoever waits is ordered after."""

    def __init__(
        self,
        done: torch.cuda.Event,
        device: torch.device,
        waits: list[_Wait] | None,
    ) -> None:
        self._done, self._device, self._waits = done, device, waits

    def wait(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._waits is None:
            stream.wait_event(self._done)
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        stream.wait_event(self._done)
        end.record(stream)
        self._waits.append((begin, end))


def copy_stream(device: torch.device, timed: bool = False) -> SideStream:
    """A side stream for copies between the host and ``device``. ``timed``: someone asks it for
    ``take_wait_s`` after every pass; without that its events would only pile up.
    """
    if device.type == "cuda":
        return CudaSideStream(device, timed)
    # Modes of torch's dispatcher, fake tensors among them, hold on the thread that entered them.
    return InlineSideStream() if is_fake() else ThreadSideStream()


def collective_stream(device: torch.device, timed: bool = False) -> SideStream:
    """A side stream for collectives of tensors on ``device``; ``timed`` as in ``copy_stream``."""
    return CudaSideStream(device, timed) if device.type == "cuda" else CollectiveSideStream()


def device_thread(device: torch.device, name: str) -> ThreadPoolExecutor:
    """A thread for work that asks ``device``, too: what CUDA does on a new thread is for GPU 0
    otherwise, where each rank would set up hundreds of MB that it never uses.
    """
    if device.type != "cuda":
        return ThreadPoolExecutor(1, name)
    return ThreadPoolExecutor(1, name, torch.cuda.set_device, (device,))


def is_fake() -> bool:
    """Whether tensors that are made now are fake: shapes without memory."""
    return detect_fake_mode() is not None


def _finish(work: Task) -> None:
    handle = work()
    if handle is not None:
        handle.wait()


def copy(into: Tensor, source: Tensor) -> None:
    """A copy as the work of a side stream: on CUDA the host does not wait for it."""
    into.copy_(source, non_blocking=True)
