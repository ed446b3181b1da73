"""No pipeline waits for itself: real stages and point-to-point traffic, over the model in
``tiny_wire``.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import tiny_wire
import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch, collate
from fttrain.distributed.rank_group import RankGroup
from fttrain.schedule import pipeline_p2p
from fttrain.schedule.one_f_one_b import one_f_one_b
from fttrain.schedule.pipeline_p2p import NEXT, PREV, PipelineP2P
from fttrain.schedule.stage_pass import StagePass

CPU, WIDTH = torch.device("cpu"), 1
STAGES = [2, 3, 4, 5, 8]
BATCHES = [collate([([1, 2], [1, 2])], index) for index in range(16)]


class NoLayers:
    """The ends of a model without a layer between them: what a stage says is all it does."""

    device, layers = CPU, ()

    @property
    def head(self) -> "NoLayers":
        return self

    on_device = nullcontext

    def embed(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(len(input_ids), WIDTH)

    def rotary(self, position_ids: Tensor) -> None:
        return None

    def loss_and_gradient(
        self, hidden: Tensor, targets: Tensor, trained: Tensor, target_counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros(()), hidden

    def metric_sums(self, hidden: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
        return torch.zeros(1)


Act = Callable[[StagePass, int, int], None]  # on (stage) of (stages)


def train(stage: StagePass, rank: int, stages: int) -> None:
    one_f_one_b(rank, stages, len(stage), stage.forward, stage.backward)


def evaluate(stage: StagePass, rank: int, stages: int) -> None:
    for number in range(len(stage)):
        stage.evaluate(number)


def record(
    act: Act, stages: int, batches: Sequence[MicroBatch], monkeypatch: pytest.MonkeyPatch
) -> list[tiny_wire.Wire]:
    """What each stage asks of its communicators as it does ``act``, two times in a row."""
    wires = [tiny_wire.Wire(rank) for rank in range(stages)]
    for rank, recorder in enumerate(wires):
        monkeypatch.setattr(pipeline_p2p, "torch_dist", recorder)
        p2p = PipelineP2P(RankGroup(rank, stages, rank, CPU), WIDTH, torch.float32)
        for _ in range(2):
            model: Any = NoLayers()
            stage = StagePass(model, (), p2p, (), None, batches, lambda batch: None)  # type: ignore[arg-type]
            act(stage, rank, stages)
            p2p.flush()
    return wires


@pytest.mark.parametrize("act", [train, evaluate])
@pytest.mark.parametrize("queue_of", [tiny_wire.nccl, tiny_wire.staged])
@pytest.mark.parametrize("stages", STAGES)
def test_every_stage_comes_to_its_end(
    stages: int,
    act: Act,
    queue_of: Callable[[tiny_wire.Transfer], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for micro_batches in range(1, len(BATCHES) + 1):
        wires = record(act, stages, BATCHES[:micro_batches], monkeypatch)
        # Making a communicator is itself something that all ranks do together.
        assert all(one.groups == wires[0].groups for one in wires)
        assert not tiny_wire.stuck(wires, queue_of), micro_batches


def test_the_model_sees_a_circle() -> None:
    """Two stages that both send before they receive, over one communicator."""
    first, second = wires = [tiny_wire.Wire(0), tiny_wire.Wire(1)]
    for one, peer in ((first, 1), (second, 0)):
        one.isend(None, peer)
        one.irecv(None, peer).wait()
    assert tiny_wire.stuck(wires, tiny_wire.nccl) == [0, 1]


def test_one_communicator_for_a_direction_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """From four stages on: the receive that a middle stage opens early stands before its send."""

    def shared(group: RankGroup) -> dict[tuple[int, int], Any]:
        communicators = {step: pipeline_p2p.torch_dist.new_group() for step in (NEXT, PREV)}
        neighbours = range(group.world_size - 1)
        return {(lower, step): communicators[step] for lower in neighbours for step in (NEXT, PREV)}

    monkeypatch.setattr(pipeline_p2p, "_communicators", shared)
    for stages in STAGES:
        wires = record(train, stages, BATCHES[:8], monkeypatch)
        assert bool(tiny_wire.stuck(wires, tiny_wire.nccl)) is (stages >= 4), stages
