"""The race detector itself: each kind of race in a few lines, wrong and right."""

from collections.abc import Callable, Iterator

import pytest
import torch
from simulated_streams import CPU, Simulation, simulated_streams
from stream_races import Race
from torch import Tensor

from fttrain.store import side_stream

SIZE = 8


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    with simulated_streams() as running:
        yield running


def pinned() -> Tensor:
    return torch.empty(SIZE, pin_memory=True).fill_(1)


def make_stream() -> torch.cuda.Stream:
    """Ordered after what the compute was asked so far."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    return side


def put_on(stream: torch.cuda.Stream, work: Callable[[], object]) -> torch.cuda.Event:
    """``work`` on ``stream``; the event behind it."""
    with torch.cuda.stream(stream):
        work()
        done = torch.cuda.Event()
        done.record()
    return done


def used_before_its_copy(right: bool) -> None:
    tensor, on_host = torch.empty(SIZE), pinned()
    side = make_stream()
    done = put_on(side, lambda: tensor.copy_(on_host, non_blocking=True))
    if right:
        torch.cuda.current_stream().wait_event(done)
    tensor.sum()


def copied_before_it_is_made(right: bool) -> None:
    side, on_host = torch.cuda.Stream(), pinned()
    made = torch.ones(SIZE)
    if right:
        side.wait_stream(torch.cuda.current_stream())
    put_on(side, lambda: on_host.copy_(made, non_blocking=True)).wait()


def filled_where_another_one_may_lie(right: bool) -> None:
    """What is new on the compute's stream may have been a tensor that its kernels still read."""
    side, tensor = torch.cuda.Stream(), torch.empty(SIZE)
    if right:
        side.wait_stream(torch.cuda.current_stream())
    put_on(side, lambda: tensor.fill_(1)).wait()


def slot_overwritten_while_read(right: bool) -> None:
    slot, on_host, used = torch.empty(SIZE), pinned(), torch.cuda.Event()
    side = make_stream()
    for _ in range(2):
        if right:
            side.wait_event(used)
        put_on(side, lambda: slot.copy_(on_host, non_blocking=True)).wait()
        slot.sum()
        used.record()


def event_recorded_too_early(right: bool) -> None:
    side, slot, used = torch.cuda.Stream(), torch.zeros(SIZE), torch.cuda.Event()
    used.record()
    slot.sum()
    if right:
        used.record()
    side.wait_event(used)
    put_on(side, slot.zero_)


def freed_under_a_copy(right: bool) -> None:
    leaving, on_host = [torch.ones(SIZE)], pinned()
    side = make_stream()
    left = put_on(side, lambda: on_host.copy_(leaving[0], non_blocking=True))
    if right:
        left.wait()
    leaving.clear()
    torch.zeros(SIZE)  # may be given that memory
    left.synchronize()
    on_host.sum()


def freed_under_a_write(right: bool) -> None:
    coming = [torch.zeros(SIZE)]
    side = make_stream()
    here = put_on(side, lambda: coming[0].fill_(1))
    if right:
        here.wait()
    coming.clear()
    torch.zeros(SIZE)


def freed_where_it_was_not_made(right: bool) -> None:
    """The other way round: a side stream made it, and the compute uses it."""
    side, made = torch.cuda.Stream(), list[Tensor]()
    put_on(side, lambda: made.append(torch.ones(SIZE))).wait()
    total = made[0].sum()
    made.clear()
    if right:
        side.wait_stream(torch.cuda.current_stream())
    put_on(side, lambda: torch.zeros(SIZE))
    total.item()


def pinned_rewritten_under_its_copy(right: bool) -> None:
    tensor, on_host = torch.empty(SIZE), pinned()
    side = make_stream()
    done = put_on(side, lambda: tensor.copy_(on_host, non_blocking=True))
    if right:
        done.synchronize()
    on_host.fill_(2)


def host_reads_before_the_copy(right: bool) -> None:
    on_host, tensor = pinned(), torch.ones(SIZE)
    on_host.copy_(tensor, non_blocking=not right)
    on_host.sum()


def thread_reads_before_the_copy(right: bool) -> None:
    tensor, on_host = torch.ones(SIZE), pinned()
    side = make_stream()
    put_on(side, lambda: on_host.copy_(tensor, non_blocking=True))
    if right:
        side.synchronize()
    side_stream.device_thread(CPU, "reader").submit(on_host.sum).result()


def host_reads_what_a_thread_writes(right: bool) -> None:
    on_host = pinned()
    writing = side_stream.device_thread(CPU, "writer").submit(on_host.fill_, 2)
    if right:
        writing.result()
    on_host.sum()


# Memory, the earlier access, the later one; {0} stands for the example's name
EXAMPLES = {
    used_before_its_copy: (
        "float32 (8,) of {0}",
        "copy_ in {0}.<lambda> writes it on a stream of make_stream",
        "sum in {0} reads it on compute",
    ),
    copied_before_it_is_made: (
        "float32 (8,) of {0}",
        "ones in {0} writes it on compute",
        "copy_ in {0}.<lambda> reads it on a stream of {0}",
    ),
    filled_where_another_one_may_lie: (
        "float32 (8,) of {0}",
        "empty in {0} writes it on compute",
        "fill_ in {0}.<lambda> writes it on a stream of {0}",
    ),
    slot_overwritten_while_read: (
        "float32 (8,) of {0}",
        "sum in {0} reads it on compute",
        "copy_ in {0}.<lambda> writes it on a stream of make_stream",
    ),
    event_recorded_too_early: (
        "float32 (8,) of {0}",
        "sum in {0} reads it on compute",
        "zero_ in put_on writes it on a stream of {0}",
    ),
    freed_under_a_copy: (
        "float32 (8,) of {0}",
        "copy_ in {0}.<lambda> reads it on a stream of make_stream",
        "it is freed on compute",
    ),
    freed_under_a_write: (
        "float32 (8,) of {0}",
        "fill_ in {0}.<lambda> writes it on a stream of make_stream",
        "it is freed on compute",
    ),
    freed_where_it_was_not_made: (
        "float32 (8,) of {0}.<lambda>",
        "sum in {0} reads it on compute",
        "it is freed on a stream of {0}",
    ),
    pinned_rewritten_under_its_copy: (
        "float32 (8,) of pinned",
        "copy_ in {0}.<lambda> reads it on a stream of make_stream",
        "fill_ in {0} writes it on host",
    ),
    host_reads_before_the_copy: (
        "float32 (8,) of pinned",
        "copy_ in {0} writes it on compute",
        "sum in {0} reads it on host",
    ),
    thread_reads_before_the_copy: (
        "float32 (8,) of pinned",
        "copy_ in {0}.<lambda> writes it on a stream of make_stream",
        "sum in {0} reads it on thread reader",
    ),
    host_reads_what_a_thread_writes: (
        "float32 (8,) of pinned",
        "fill_ in {0} writes it on thread writer",
        "sum in {0} reads it on host",
    ),
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_a_race_is_found_with_its_ops_and_its_memory(
    example: Callable[[bool], None], simulation: Simulation
) -> None:
    example(False)
    words = (each.format(example.__name__) for each in EXAMPLES[example])
    assert simulation.races == [Race(*words)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_what_is_in_order_is_no_race(
    example: Callable[[bool], None], simulation: Simulation
) -> None:
    example(True)
    assert simulation.races == []


def test_order_goes_through_other_streams(simulation: Simulation) -> None:
    tensor = torch.zeros(SIZE)
    first, second = make_stream(), torch.cuda.Stream()
    put_on(first, lambda: tensor.fill_(1))
    second.wait_stream(first)
    torch.cuda.current_stream().wait_stream(second)
    tensor.sum()
    assert simulation.races == []


def test_only_bytes_in_common_race(simulation: Simulation) -> None:
    tensor = torch.zeros(2, SIZE)
    side = make_stream()
    put_on(side, lambda: tensor[0].fill_(1))
    tensor[1].sum()
    assert simulation.races == []
    tensor.view(-1)[SIZE - 1 : SIZE + 1].sum()  # one value of each
    assert len(simulation.races) == 1


@pytest.mark.parametrize("use", [False, True])
@pytest.mark.parametrize("when", ["before the free", "after it", "once it is overwritten"])
def test_a_copy_that_comes_too_late_matters_where_someone_reads_it(
    when: str, use: bool, simulation: Simulation
) -> None:
    on_host, leaving = pinned(), [torch.ones(SIZE)]
    side = make_stream()
    put_on(side, lambda: on_host.copy_(leaving[0], non_blocking=True))
    if when == "before the free" and use:
        put_on(side, lambda: torch.zeros(SIZE).copy_(on_host, non_blocking=True))
    leaving.clear()
    torch.zeros(SIZE)
    side.synchronize()
    if when == "once it is overwritten":
        on_host.fill_(3)
    if when != "before the free" and use:
        on_host.sum()
    assert len(simulation.races) == (use and when != "once it is overwritten")


def test_nothing_is_left_of_the_simulation() -> None:
    before = torch.cuda.Stream, torch.cuda.current_stream, side_stream.copy_stream(CPU).__class__
    with simulated_streams():
        assert isinstance(side_stream.copy_stream(CPU), side_stream.CudaSideStream)
    after = torch.cuda.Stream, torch.cuda.current_stream, side_stream.copy_stream(CPU).__class__
    assert after == before
