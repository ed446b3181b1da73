"""Resident layers x one_f_one_b: one stage of a pipeline, as a strategy."""

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.schedule import generate
from fttrain.schedule.generate import KeyValueCache, NewTokens
from fttrain.schedule.one_f_one_b import one_f_one_b
from fttrain.schedule.pipeline_p2p import NEXT, PREV, PipelineP2P
from fttrain.schedule.stage_pass import StagePass
from fttrain.schedule.step_runner import Dropout, StepRunner
from fttrain.store import Traffic
from fttrain.strategy.native import NativeStrategy, StrategyParts


class PipelineStage(NativeStrategy):
    """One stage. Its decoder has this stage's layers, and the ends where it is first or last.

    Every rank is given the micro-batches of all ranks of its machine: it needs their shapes, the
    first stage the tokens, the last one the targets.
    """

    def __init__(self, parts: StrategyParts) -> None:
        super().__init__(parts)
        decoder = self.decoder
        self._link = PipelineP2P(self._group, decoder.architecture.hidden, decoder.dtype)

    @property
    def data_parallel(self) -> tuple[int, int]:
        return self._group.inter_node.rank, self._group.inter_node.world_size

    def _forward_backward(self, micro_batches: list[MicroBatch], dropout: Dropout) -> StepRunner:
        stage = self._pass(micro_batches, dropout)
        machine = self._group.intra_node
        one_f_one_b(machine.rank, machine.world_size, len(stage), stage.forward, stage.backward)
        if not len(stage):
            stage.end_all_layers()
        self._link.flush()
        return stage.runner

    def _forward(self, micro_batches: list[MicroBatch]) -> tuple[StepRunner, int]:
        stage = self._pass(micro_batches, lambda batch: None)
        for number in range(len(stage)):
            stage.evaluate(number)
        self._link.flush()
        return stage.runner, len(stage)

    def _pass(self, micro_batches: list[MicroBatch], dropout: Dropout) -> StagePass:
        """What this stage does in a pass of those that have tokens."""
        some = [batch for batch in micro_batches if batch.lengths]
        return StagePass(
            self.decoder, self._store, self._link, self._policies, self._gradients, some, dropout
        )

    def _next_tokens(self, cache: KeyValueCache, fresh: NewTokens) -> list[int]:
        if self._link.is_first:
            hidden = self.decoder.embed(fresh.tokens)
        else:
            hidden = self._link.receive(len(fresh.tokens), PREV).tensor()
        hidden = generate.through_layers(self.decoder, self._store, cache, fresh, hidden)
        chosen = [0] * len(fresh.ends)
        if self._link.is_last:
            chosen = generate.most_likely(self.decoder, fresh, hidden)
        else:
            self._link.send(hidden, NEXT)
        # Machines must not come to differ in how many passes they make: the first one decides.
        last = self._group.intra_node.world_size - 1
        tokens: list[int] = self._group.broadcast(torch.tensor(chosen), last).tolist()
        self._link.flush()
        return tokens

    def _counted(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """All ranks of a machine have the same micro-batches: one of them counts."""
        return micro_batches if self._link.is_first else []

    def _of_all_layers(self, norms: Tensor) -> Tensor:
        """Exact: all other stages add zeros."""
        whole = norms.new_zeros(self.decoder.architecture.layers)
        first = self.decoder.layers[0].index
        whole[first : first + len(norms)] = norms
        return self._group.intra_node.all_reduce_(whole)

    def _take_traffic(self) -> Traffic:
        traffic = super()._take_traffic() + self._link.take_traffic()
        return traffic + self.decoder.head.take_traffic() if self._link.is_last else traffic
