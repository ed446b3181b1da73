"""Slots: order of need, nothing brought twice, nothing overwritten while it is used."""

from typing import Any

import pytest
import tiny_store
from torch import Tensor

from fttrain.distributed.collectives import Handle
from fttrain.store.side_stream import Task, ThreadSideStream
from fttrain.store.slots import Slots


class NumberedEvents(ThreadSideStream):
    """Number the events, and write down which one each task is ordered after."""

    def __init__(self) -> None:
        super().__init__()
        self.events, self.after = 0, list[Any]()

    def record_event(self) -> int:
        self.events += 1
        return self.events

    def run(self, task: Task, after: Any = None) -> Handle:
        self.after.append(after)
        return super().run(task, after)


class Brought:
    """Fills a slot with the number of its layer; writes down what was brought."""

    def __init__(self, count: int) -> None:
        self.log: list[int] = []
        self.stream = NumberedEvents()
        self.slots = Slots(count, 4, tiny_store.CPU, self.stream, self.bring)

    def bring(self, layer: int, slot: Tensor) -> None:
        self.log.append(layer)
        slot.fill_(layer)

    def run_pass(self, order: list[int]) -> None:
        """A pass, each layer checked as it is used."""
        for position, layer in enumerate(order):
            self.slots.prefetch(order[position:])
            assert self.slots.acquire(layer).tolist() == [layer] * 4
            self.slots.release(layer)


def test_the_first_ones_needed_are_brought_in_their_order() -> None:
    brought = Brought(2)
    assert brought.slots.prefetch([3, 1, 0, 2]) == [3, 1]
    assert brought.slots.prefetch([3, 1, 0, 2]) == []  # on their way
    brought.stream.synchronize()
    assert brought.log == [3, 1]


def test_a_slot_in_use_is_not_filled() -> None:
    brought = Brought(2)
    brought.slots.prefetch([0, 1])
    held = brought.slots.acquire(0)
    assert brought.slots.prefetch([1, 2, 3]) == []
    brought.slots.acquire(1)
    assert brought.slots.prefetch([2, 3]) == []
    assert held.tolist() == [0] * 4
    brought.slots.release(1)
    assert brought.slots.prefetch([2, 3]) == [2]
    brought.stream.synchronize()
    assert held.tolist() == [0] * 4
    brought.slots.release(0)
    assert brought.slots.prefetch([2, 3]) == [3]
    brought.stream.synchronize()
    assert held.tolist() == [3] * 4  # its slot, and not the one that 2 waits in


def test_a_slot_is_filled_after_its_own_release() -> None:
    """A fill is ordered after the event that the release of that slot recorded, no other."""
    brought = Brought(2)
    brought.slots.prefetch([0, 1])
    start, stream = brought.stream.events, brought.stream
    brought.slots.acquire(0)
    brought.slots.acquire(1)
    brought.slots.release(1)  # event start + 1
    brought.slots.release(0)  # event start + 2
    brought.slots.prefetch([0, 2])
    brought.slots.prefetch([2, 3])
    assert stream.after == [start, start, start + 1, start + 2]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
def test_what_lies_there_at_a_turn_is_not_brought_again(count: int, layers: int) -> None:
    """A pass brings each layer once, less those that the turn found."""
    brought = Brought(count)
    up = list(range(layers))
    brought.run_pass(up)
    assert brought.log == up
    for order in (up[::-1], up, up[::-1], up):
        brought.log.clear()
        brought.run_pass(order)
        assert brought.log == order[count:]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_order_of_passes_finds_its_layers(count: int) -> None:
    brought = Brought(count)
    for order in tiny_store.passes_up_and_down(7, 60, seed=count):
        brought.run_pass(order)


def test_an_error_while_bringing_is_raised_in_acquire() -> None:
    def fail(layer: int, slot: Tensor) -> None:
        raise OSError("disk gone")

    slots = Slots(2, 4, tiny_store.CPU, ThreadSideStream(), fail)
    slots.prefetch([0])
    with pytest.raises(OSError, match="disk gone"):
        slots.acquire(0)
