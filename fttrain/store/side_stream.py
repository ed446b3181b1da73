"""Side streams: tasks that run beside the compute, in order, without the host waiting for them.

On CUDA a side stream is a CUDA stream. On the CPU it is a thread for copies, or the collective
library's own threads for collectives. ``run`` starts a task. ``Handle.wait`` orders the compute
that follows after the task. ``record_event`` marks a moment in the compute for tasks to come after.
"""

import time
from abc import ABC, abstractmethod
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
    """A queue of tasks that run beside the compute, in the order in which they were given."""

    def record_event(self) -> Event:
        """An event after all that has been issued to the compute so far."""
        ...

    def run(self, task: Task, after: Event | None = None) -> Handle:
        """Start ``task`` once the compute has reached ``after``; None: all that has been issued so
        far.
        """
        ...

    def synchronize(self) -> None:
        """Block the host until all tasks are done."""
        ...

    def take_wait_s(self) -> float:
        """Seconds that the compute spent in ``wait`` since the last call. On CUDA only waits that
        are over count: the call never waits for the device.
        """
        ...


class HostSideStream(ABC):
    """A side stream on the CPU, where the compute is always up to date: events mean nothing."""

    def __init__(self) -> None:
        self._under_way: list[_TimedHandle] = []  # not waited for so far
        self._wait_s = 0.0

    def record_event(self) -> Event:
        return None

    def run(self, task: Task, after: Event | None = None) -> Handle:
        started = _TimedHandle(self._start(task), self._waited)
        self._under_way = [handle for handle in self._under_way if not handle.over] + [started]
        return started

    def synchronize(self) -> None:
        for handle in self._under_way:
            handle.wait()

    def take_wait_s(self) -> float:
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    @abstractmethod
    def _start(self, task: Task) -> Callable[[], Any]:
        """Start ``task``. Return a function that returns once it is done."""

    def _waited(self, seconds: float) -> None:
        self._wait_s += seconds


class ThreadSideStream(HostSideStream):
    """Copies on the CPU, done in order by one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "side stream")

    def _start(self, task: Task) -> Callable[[], Any]:
        return self._thread.submit(_finish, task).result


class InlineSideStream(HostSideStream):
    """Copies on the CPU, each done before ``run`` returns."""

    def _start(self, task: Task) -> Callable[[], Any]:
        _finish(task)
        return lambda: None


class CollectiveSideStream(HostSideStream):
    """Collectives on the CPU: started by the caller, so that all ranks start them in one order, and
    carried on by the library's threads.
    """

    def _start(self, task: Task) -> Callable[[], Any]:
        return (task() or HandleGroup(())).wait


class CudaSideStream:
    """Copies or collectives on a CUDA stream. The host waits for it in ``synchronize`` alone."""

    def __init__(self, device: torch.device, timed: bool) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Events around each wait of the compute stream, read once they are over. None: not timed.
        self._waits: list[_Wait] | None = [] if timed else None

    def record_event(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def run(self, task: Task, after: Event | None = None) -> Handle:
        self._stream.wait_event(self.record_event() if after is None else after)
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            _finish(task)
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
    """A wait of the host. The first call is timed; later ones return at once."""

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
    """A CUDA event: ``wait`` orders the caller's current stream after it."""

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
    """A side stream for copies between the host and ``device``. ``timed``: the caller reads
    ``take_wait_s`` after every pass; otherwise the events of waits would only pile up.
    """
    if device.type == "cuda":
        return CudaSideStream(device, timed)
    # Dispatch modes of torch, FakeTensorMode among them, hold only on the thread that entered them.
    return InlineSideStream() if is_fake() else ThreadSideStream()


def collective_stream(device: torch.device, timed: bool = False) -> SideStream:
    """A side stream for collectives of tensors on ``device``; ``timed`` as in ``copy_stream``."""
    return CudaSideStream(device, timed) if device.type == "cuda" else CollectiveSideStream()


def device_thread(device: torch.device, name: str) -> ThreadPoolExecutor:
    """A thread whose current CUDA device is ``device``. A new thread's is GPU 0 otherwise, where
    each rank would set up a context of hundreds of MB that it never uses.
    """
    if device.type != "cuda":
        return ThreadPoolExecutor(1, name)
    return ThreadPoolExecutor(1, name, torch.cuda.set_device, (device,))


def is_fake() -> bool:
    """Whether new tensors are fake: shapes without memory."""
    return detect_fake_mode() is not None


def _finish(task: Task) -> None:
    handle = task()
    if handle is not None:
        handle.wait()


def copy(into: Tensor, source: Tensor) -> None:
    """Copy, as a task of a side stream: on CUDA the host does not wait for it."""
    into.copy_(source, non_blocking=True)
