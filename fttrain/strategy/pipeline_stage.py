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
    """A stage. Its decoder has the stage's layers, the embedding on the first stage, and the head
    on the last one.

    Every rank is given the micro-batches of all ranks of its node: all stages need their shapes,
    the first one the tokens, the last one the targets.
    """

    def __init__(self, parts: StrategyParts) -> None:
        super().__init__(parts)
        decoder = self.decoder
        self._p2p = PipelineP2P(self._group, decoder.architecture.hidden, decoder.dtype)

    @property
    def data_parallel(self) -> tuple[int, int]:
        return self._group.inter_node.rank, self._group.inter_node.world_size

    def _forward_backward(self, micro_batches: list[MicroBatch], dropout: Dropout) -> StepRunner:
        stage = self._pass(micro_batches, dropout)
        node = self._group.intra_node
        one_f_one_b(node.rank, node.world_size, len(stage), stage.forward, stage.backward)
        if not len(stage):
            stage.end_all_layers()
        self._p2p.flush()
        return stage.runner

    def _forward(self, micro_batches: list[MicroBatch]) -> tuple[StepRunner, int]:
        stage = self._pass(micro_batches, lambda batch: None)
        for number in range(len(stage)):
            stage.evaluate(number)
        self._p2p.flush()
        return stage.runner, len(stage)

    def _pass(self, micro_batches: list[MicroBatch], dropout: Dropout) -> StagePass:
        """The pass over the micro-batches that have tokens."""
        with_tokens = [batch for batch in micro_batches if batch.lengths]
        return StagePass(
            self.decoder,
            self._store,
            self._p2p,
            self._policies,
            self._gradients,
            with_tokens,
            dropout,
        )

    def _next_tokens(self, cache: KeyValueCache, fresh: NewTokens) -> list[int]:
        if self._p2p.is_first:
            hidden = self.decoder.embed(fresh.tokens)
        else:
            hidden = self._p2p.receive(len(fresh.tokens), PREV).tensor()
        hidden = generate.through_layers(self.decoder, self._store, cache, fresh, hidden)
        chosen = [0] * len(fresh.ends)
        if self._p2p.is_last:
            chosen = generate.most_likely(self.decoder, fresh, hidden)
        else:
            self._p2p.send(hidden, NEXT)
        # The first node decides, so that all nodes make the same number of passes.
        last = self._group.intra_node.world_size - 1
        tokens: list[int] = self._group.broadcast(torch.tensor(chosen), last).tolist()
        self._p2p.flush()
        return tokens

    def _counted(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches on the first stage alone: all stages of a node have the same ones."""
        return micro_batches if self._p2p.is_first else []

    def _of_all_layers(self, norms: Tensor) -> Tensor:
        """Gather the norms of all stages. The sum is exact: all other stages add zeros."""
        whole = norms.new_zeros(self.decoder.architecture.layers)
        first = self.decoder.layers[0].index
        whole[first : first + len(norms)] = norms
        return self._group.intra_node.all_reduce_(whole)

    def _take_traffic(self) -> Traffic:
        traffic = super()._take_traffic() + self._p2p.take_traffic()
        return traffic + self.decoder.head.take_traffic() if self._p2p.is_last else traffic
