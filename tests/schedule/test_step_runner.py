"""What a rank still holds of a step for which memory did not suffice: nothing."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fttrain.data.batch import collate
from fttrain.model.config import LoraConfig
from fttrain.schedule import layer_pass
from fttrain.schedule.activations import Keep, Rotary
from fttrain.schedule.step_runner import StepRunner


class Watched(Keep):
    """Holds a tensor of its own in each call, runs out of memory in the fourth one of a kind, and
    notes what still lives in each discard.
    """

    def __init__(self, runs_out: str) -> None:
        self.runs_out, self.calls = runs_out, 0
        self.made: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []  # at each ``discard``

    def forward(self, layer: Any, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Any]:
        self.note(hidden)
        output, saved = super().forward(layer, hidden, rotary)
        self.note(output)
        self.call("forward")
        return output, (saved, self.note(torch.zeros(5)))

    def backward(self, layer: Any, saved: Any, grad: Tensor, rotary: Rotary) -> Tensor:
        held = self.note(torch.zeros(3)), self.note(grad)
        self.call("backward")
        found = super().backward(layer, saved[0], grad, rotary)
        assert len(held) == 2
        return found

    def discard(self) -> None:
        self.alive.append(sum(reference() is not None for reference in self.made))

    def note(self, tensor: Tensor) -> Tensor:
        self.made.append(weakref.ref(tensor))
        return tensor

    def call(self, name: str) -> None:
        self.calls += name == self.runs_out
        if name == self.runs_out and self.calls == 4:
            torch.empty(1 << 60, dtype=torch.uint8)


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What only the collector would free does not count as free."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("runs_out", ["forward", "backward"])
def test_all_is_gone_before_memory_is_given_back(runs_out: str) -> None:
    """Two micro-batches are under way. The tensors of the failed call go, too, though the error
    would hold them.
    """
    decoder, store = tiny.build(tiny.model(), tiny.PLAIN, LoraConfig(r=4))
    tiny.gradient_home(decoder)
    policy = Watched(runs_out)
    runner = StepRunner(decoder, [policy] * len(store), lambda batch: None)
    for index in range(2):
        runner.start(collate(tiny.documents((9, 17), seed=index), index))
    for layer in layer_pass.iterate_layers(decoder, store, range(len(store))):
        runner.forward(layer)
    runner.head()
    for layer in layer_pass.iterate_layers(decoder, store, range(len(store) - 1, -1, -1)):
        runner.backward(layer)
    assert policy.alive == [0]
    assert len(policy.made) > 8
    assert not runner.in_flight
    assert "tried to allocate" in runner.ran_out
    runner.start(collate(tiny.documents((9,)), 2))
    assert not runner.in_flight  # there is no point any more


def test_what_was_said_first_counts() -> None:
    decoder, _ = tiny.build(tiny.model(), tiny.PLAIN, LoraConfig(r=4))
    runner = StepRunner(decoder, (), lambda batch: None)
    for exponent in (60, 61):
        with runner.computing():
            torch.empty(1 << exponent, dtype=torch.uint8)
    assert str(1 << 60) in runner.ran_out
