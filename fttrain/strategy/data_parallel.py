"""Store x grouped(G) x all_reduce: each rank passes its micro-batches through all layers.

replicate, shard and stream are this strategy over different stores.
"""

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.schedule import generate, grouped
from fttrain.schedule.config import ScheduleConfig
from fttrain.schedule.generate import KeyValueCache, NewTokens
from fttrain.schedule.step_runner import Dropout, StepRunner
from fttrain.store import FrozenBase, Store, Traffic
from fttrain.strategy.context import BuildContext
from fttrain.strategy.grad_reduce import gradient_sync
from fttrain.strategy.model_slice import ModelSlice, reserve_slice
from fttrain.strategy.native import NativeStrategy, StrategyParts, build_parts

EVALUATION_GROUP = 8  # G where nothing is saved for backward


class DataParallel(NativeStrategy):
    """A strategy whose ranks differ in their micro-batches alone."""

    def __init__(self, parts: StrategyParts, schedule: ScheduleConfig) -> None:
        super().__init__(parts)
        self._schedule = schedule
        self._sharded = parts.optim.shard
        self._local_next_tokens = generate.whole_model(self.decoder, self._store)

    @property
    def data_parallel(self) -> tuple[int, int]:
        return self._group.rank, self._group.world_size

    def _forward_backward(self, micro_batches: list[MicroBatch], dropout: Dropout) -> StepRunner:
        return grouped.forward_backward(
            self.decoder,
            self._store,
            micro_batches,
            self._schedule.size(len(micro_batches)),
            self._policies,
            dropout,
            self._gradients,
        )

    def _forward(self, micro_batches: list[MicroBatch]) -> tuple[StepRunner, int]:
        runner = grouped.evaluate(self.decoder, self._store, micro_batches, EVALUATION_GROUP)
        return runner, -(-len(micro_batches) // EVALUATION_GROUP)

    def _next_tokens(self, cache: KeyValueCache, fresh: NewTokens) -> list[int]:
        # Rank 0 decides, so that all ranks make the same number of passes.
        local = torch.tensor(self._local_next_tokens(cache, fresh))
        tokens: list[int] = self._group.broadcast(local).tolist()
        return tokens

    def _of_all_layers(self, norms: Tensor) -> Tensor:
        """Norms of this rank's shards -> norms of the whole gradients, fp32 (layers,)."""
        if not self._sharded:
            return norms
        return self._group.all_reduce_(norms.square()).sqrt()

    def _take_traffic(self) -> Traffic:
        return super()._take_traffic() + self.decoder.head.take_traffic()


def reserve_data_parallel(context: BuildContext) -> ModelSlice:
    """Reserve all but the frozen layers. Return the slice: every rank has the whole model."""
    model_slice = ModelSlice(range(context.architecture.layers))
    reserve_slice(context, model_slice, _in_flight(context))
    return model_slice


def build_data_parallel(
    context: BuildContext, base: FrozenBase, model_slice: ModelSlice, store: Store
) -> DataParallel:
    """Build the strategy around ``store``."""
    sync = gradient_sync(context.group, context.spec.optim.shard)
    parts = build_parts(context, base, model_slice, store, _in_flight(context), sync)
    return DataParallel(parts, context.spec.schedule)


def _in_flight(context: BuildContext) -> int:
    """G: the most micro-batches between forward and backward."""
    return context.spec.schedule.size(context.spec.size.gradient_accumulation_steps)
