"""CUDA's streams and events, simulated on the CPU: which ops would race on a card.

    with simulated_streams() as simulation:
        ...                                   # what is to be examined, on the CPU
    assert simulation.races == []

Inside the block ``torch.cuda``'s streams and events are stand-ins that compute nothing and keep
vector clocks (``stream_races``). Ops run at once, one after the other, on the one thread there is.
A dispatch mode sees each of them with the tensors that it reads and writes, and books them on the
stream, or the thread of the host, on which a card would run them. So one run finds what any timing
could bring about, as long as the program asks for the same ops. Side streams are
``CudaSideStream`` as on a card, and threads that ask a device are timelines of the host and do at
once what they are given.

What a card would do is told apart as follows.
- Memory of ``MemoryLedger`` and page-locked memory is the host's, and so is what ``in_host_memory``
  says; all else is the device's, also small tensors that a run has on the host. An op whose memory
  is all the host's is done by the host, at once; so is all that a thread of the host does but for
  what it puts on a stream.
- The host is ordered after a stream by ``synchronize`` of stream or event, by a copy to or from its
  memory that is not ``non_blocking``, and by ``item()``. CUDA waits in more places: where one
  matters it shows here as a race.
- A stream never goes ahead of the host: what the host has done by itself an op finds done.

What it cannot see: what other ranks do (``simulated_nccl`` has the streams of NCCL on this one);
kernels inside an op; what is done without torch's dispatcher (numpy, mmap, ``tolist``); bytes
between the strides of a tensor, which count as used; which of two host threads is earlier but for
``submit`` and ``result``; an order of ops that another run might have; what code does for
``device.type == "cuda"`` alone, as page-locking; time.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import stream_races
import torch
from op_accesses import accessed, tensors, waits
from stream_races import Block, Memory, Race, Span, Timeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fttrain
from fttrain.memory.ledger import MemoryLedger
from fttrain.memory.parts import MemoryPart
from fttrain.store import side_stream

CPU = torch.device("cpu")
# Functions by which an op or an allocation is named: ours, but for what only passes it on.
NAMED = (Path(fttrain.__file__).parent, Path(__file__).parent)
UNNAMED = (side_stream.__file__, stream_races.__file__, __file__)


class Stream(Timeline):
    """In place of torch.cuda.Stream."""

    device = CPU

    def __init__(self, simulation: "Simulation", name: str) -> None:
        super().__init__(name)
        self._simulation = simulation

    def wait_event(self, event: "Event") -> None:
        self.join(event.clock)

    def wait_stream(self, other: "Stream") -> None:
        self.join(other.clock)

    def synchronize(self) -> None:
        self._simulation.host.join(self.clock)


class Event:
    """In place of torch.cuda.Event. One that was never recorded holds nobody up."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self.clock: Mapping[Timeline, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._simulation.stream
        stream.join(self._simulation.host.clock)
        self.clock = dict(stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._simulation.stream).wait_event(self)

    def synchronize(self) -> None:
        self._simulation.host.join(self.clock)

    def query(self) -> bool:
        return True  # whoever asks may not rely on it for order

    def elapsed_time(self, end: "Event") -> float:
        return 0.0


class Worker:
    """In place of a ThreadPoolExecutor of one thread: a timeline of the host."""

    def __init__(self, simulation: "Simulation", name: str) -> None:
        self._simulation, self._timeline = simulation, Timeline(f"thread {name}", is_host=True)

    def submit(self, function: Callable[..., Any], *args: Any) -> "Done":
        self._timeline.join(self._simulation.host.clock)
        with self._simulation.running(self._timeline):
            result = function(*args)
        return Done(self._simulation, result, dict(self._timeline.clock))


class Done:
    """In place of a Future: of something that is over by ``clock``."""

    def __init__(
        self, simulation: "Simulation", result: Any, clock: Mapping[Timeline, int]
    ) -> None:
        self._simulation, self._result, self._clock = simulation, result, clock

    def result(self) -> Any:
        self._simulation.host.join(self._clock)
        return self._result


class Simulation(TorchDispatchMode):
    """Sees each op, and books it where a card would run it."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = Memory()
        self._blocks: dict[int, tuple[Block, object]] = {}  # by storage, with what sees it go
        # Who does what is asked next: the last one; before it those that asked for that.
        self._running: list[Timeline] = [Timeline("host", is_host=True), Stream(self, "compute")]

    @property
    def races(self) -> list[Race]:
        """Those found so far."""
        return self._memory.races

    @property
    def host(self) -> Timeline:
        """The thread of the host that runs now."""
        return next(timeline for timeline in reversed(self._running) if timeline.is_host)

    @property
    def stream(self) -> Stream:
        """The current stream; a thread of the host begins with that of the compute."""
        return next(one for one in reversed(self._running) if isinstance(one, Stream))

    @contextmanager
    def running(self, timeline: Timeline) -> Iterator[None]:
        """It does what is asked in the block."""
        self._running.append(timeline)
        try:
            yield
        finally:
            self._running.pop()

    def in_host_memory(self, tensor: Tensor, what: str) -> Tensor:
        """``tensor``, whose memory is the host's and always was; races call it ``what``."""
        block = self._block(tensor)
        block.owner, block.what, block.accesses = self._running[0], what, []
        return tensor

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", None)  # a build without CUDA has none
        for tensor in [*tensors(args), *tensors(kwargs.values())]:
            self._block(tensor)  # what is not known by now was there before
        result = func(*args, **kwargs)
        reading, writing = accessed(func, args, kwargs)
        fresh = [t for t in tensors([result]) if t.untyped_storage()._cdata not in self._blocks]
        if reading or writing or fresh:
            name = func.overloadpacket.__name__
            on_host = bool(pinned) or self._is_for_host([*reading, *writing])
            by = self.host if on_host or self._running[-1].is_host else self.stream
            self._begin(by)
            for tensor in fresh:
                self._block(tensor, by)
            reads = [self._span(tensor) for tensor in reading]
            # Also what is empty: until its maker comes to it another tensor may have lain there.
            writes = [self._span(tensor) for tensor in [*writing, *fresh]]
            self._memory.access(by, (name, _where()), reads, writes)
            crosses = len({span.block.owner.is_host for span in [*reads, *writes]}) == 2
            if waits(name, args, kwargs, crosses):
                self.host.join(by.clock)
        return result

    def _is_for_host(self, tensors: Sequence[Tensor]) -> bool:
        return bool(tensors) and all(self._block(tensor).owner.is_host for tensor in tensors)

    def _begin(self, by: Timeline) -> None:
        by.join(self.host.clock)
        self._memory.begin(by)

    def _span(self, tensor: Tensor) -> Span:
        """What it uses, from the first to the last byte."""
        values = tensor.numel()
        if values and not tensor.is_contiguous():
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            values = 1 + sum((count - 1) * stride for count, stride in strides)
        start = int(tensor.storage_offset()) * tensor.element_size()
        return Span(self._block(tensor), start, start + values * tensor.element_size())

    def _block(self, tensor: Tensor, maker: Timeline | None = None) -> Block:
        """The allocation that it lies in; one that is new is ``maker``'s, or was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._blocks:
            what = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            what += f" of {_where()}" if maker else ", made before"
            goes = weakref.ref(storage, functools.partial(self._gone, key))
            self._blocks[key] = Block(what, maker or self._running[1]), goes
        return self._blocks[key][0]

    def _gone(self, key: int, reference: object) -> None:
        self._memory.free(self._blocks.pop(key)[0])


@contextmanager
def simulated_streams() -> Iterator[Simulation]:
    """Examine what runs in the block."""
    simulation = Simulation()
    allocate = MemoryLedger.allocate

    def allocate_on_host(ledger: MemoryLedger, part: MemoryPart) -> Tensor:
        return simulation.in_host_memory(allocate(ledger, part), part.label)

    stand_ins = {
        (torch.cuda, "Stream"): lambda device=None: Stream(simulation, f"a stream of {_where()}"),
        (torch.cuda, "Event"): lambda enable_timing=False: Event(simulation),
        (torch.cuda, "stream"): simulation.running,
        (torch.cuda, "current_stream"): lambda device=None: simulation.stream,
        (side_stream, "ThreadSideStream"): lambda: side_stream.CudaSideStream(CPU, timed=True),
        (side_stream, "CollectiveSideStream"): lambda: side_stream.CudaSideStream(CPU, timed=True),
        (side_stream, "ThreadPoolExecutor"): lambda count, name: Worker(simulation, name),
        (MemoryLedger, "allocate"): allocate_on_host,
    }
    with pytest.MonkeyPatch.context() as patch:
        for (place, name), stand_in in stand_ins.items():
            patch.setattr(place, name, stand_in)
        with simulation:
            yield simulation


@functools.cache
def _is_named(file: str) -> bool:
    return file not in UNNAMED and any(Path(file).is_relative_to(folder) for folder in NAMED)


def _where() -> str:
    """The innermost function of ours that asks for what goes on."""
    frame = sys._getframe(1)
    while frame is not None and not _is_named(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_qualname.replace(".<locals>", "") if frame else "?"
