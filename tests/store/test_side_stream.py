"""Side streams on the CPU: order, what waits for what, and errors that are not lost."""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from fttrain.distributed.collectives import Handle, HandleGroup
from fttrain.store.side_stream import (
    CollectiveSideStream,
    HostSideStream,
    ThreadSideStream,
    collective_stream,
    copy,
    copy_stream,
    device_thread,
)

CPU = torch.device("cpu")


class Noted:
    """A handle that writes down when it is waited for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait(self) -> None:
        self.log.append(f"{self.name} waited for")


def noting(log: list[str], name: str) -> Callable[[], Handle]:
    """A task that writes down when it starts."""

    def task() -> Handle:
        log.append(f"{name} started")
        return Noted(log, name)

    return task


def test_a_thread_works_beside_the_caller_in_the_order_given() -> None:
    gate, log, stream = threading.Event(), list[int](), ThreadSideStream()
    first = stream.run(lambda: log.append(1) if gate.wait(30) else None)
    stream.run(lambda: log.append(2))
    assert log == []  # ``run`` has come back without them
    gate.set()
    first.wait()
    stream.synchronize()
    assert log == [1, 2]


def test_a_thread_finishes_a_task_before_the_next() -> None:
    log, stream = list[str](), ThreadSideStream()
    for name in ("a", "b"):
        stream.run(noting(log, name))
    stream.synchronize()
    assert log == ["a started", "a waited for", "b started", "b waited for"]


def test_collectives_start_at_once_and_are_waited_for_once() -> None:
    log, stream = list[str](), CollectiveSideStream()
    a, b = (stream.run(noting(log, name)) for name in ("a", "b"))
    assert log == ["a started", "b started"]
    b.wait()
    b.wait()
    a.wait()
    assert log[2:] == ["b waited for", "a waited for"]


def test_synchronize_waits_for_all_and_not_the_last_alone() -> None:
    """Collectives of a CPU end in any order."""
    log, stream = list[str](), CollectiveSideStream()
    for name in ("a", "b", "c"):
        stream.run(noting(log, name))
    stream.synchronize()
    assert [entry for entry in log if "waited" in entry] == [f"{n} waited for" for n in "abc"]


@pytest.mark.parametrize("make", [ThreadSideStream, CollectiveSideStream])
def test_an_error_is_raised_where_the_task_is_waited_for(make: type[HostSideStream]) -> None:
    def fail() -> Handle:
        def wait() -> None:
            raise OSError("link down")

        return SimpleNamespace(wait=wait)

    stream, log = make(), list[str]()
    failing = stream.run(fail)
    stream.run(noting(log, "next")).wait()
    assert log == ["next started", "next waited for"]
    for _ in range(2):
        with pytest.raises(OSError, match="link down"):
            failing.wait()
    with pytest.raises(OSError, match="link down"):
        stream.synchronize()


def test_an_error_of_a_thread_is_raised_in_the_caller() -> None:
    stream = ThreadSideStream()
    handle = stream.run(lambda: copy(torch.zeros(3), torch.zeros(4)))
    with pytest.raises(RuntimeError, match="size of tensor"):
        handle.wait()


def test_time_in_wait_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0, 20.25])  # begin and end of the waits of a and b
    monkeypatch.setattr(
        "fttrain.store.side_stream.time", SimpleNamespace(perf_counter=lambda: next(clock))
    )
    stream = CollectiveSideStream()
    a, b = (stream.run(lambda: HandleGroup(())) for _ in range(2))
    a.wait()
    a.wait()
    assert stream.take_wait_s() == 2.5
    assert stream.take_wait_s() == 0
    b.wait()
    assert stream.take_wait_s() == 0.25


def test_side_streams_of_the_cpu() -> None:
    assert isinstance(copy_stream(CPU), ThreadSideStream)
    assert isinstance(collective_stream(CPU), CollectiveSideStream)
    source, into = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    copy_stream(CPU).run(lambda: copy(into, source)).wait()
    assert torch.equal(into, source)


def test_a_thread_of_its_own_asks_the_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    card, chosen = torch.device("cuda", 1), list[tuple[int, torch.device]]()
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device))
    )
    worker = device_thread(card, "worker").submit(threading.get_ident).result()
    assert chosen == [(worker, card)]
    device_thread(CPU, "worker").submit(threading.get_ident).result()
    assert len(chosen) == 1
