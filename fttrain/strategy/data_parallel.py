"""Store x grouped(G) x all_reduce: each rank passes its own micro-batches through all layers.

replicate, shard and stream are this, over different stores.
"""

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.schedule import generate, grouped
from fttrain.schedule.attempt import Attempt, Dropout
from fttrain.schedule.config import ScheduleConfig
from fttrain.schedule.generate import Fresh, KeyValueCache
from fttrain.store import FrozenBase, Store, Traffic
from fttrain.strategy import parts
from fttrain.strategy.native import Joined, NativeStrategy, join
from fttrain.strategy.parts import Share
from fttrain.strategy.recipe import Plan
from fttrain.strategy.sync import gradient_sync

EVALUATION_GROUP = 8  # micro-batches that pass a layer together when nothing is kept for backward


class DataParallel(NativeStrategy):
    """A strategy whose ranks differ in nothing but the micro-batches they get."""

    def __init__(self, joined: Joined, schedule: ScheduleConfig) -> None:
        super().__init__(joined)
        self._schedule = schedule
        self._sharded = joined.optim.shard
        self._own_next_tokens = generate.whole_model(self.decoder, self._store)

    @property
    def data_parallel(self) -> tuple[int, int]:
        return self._group.rank, self._group.world_size

    def _forward_backward(self, micro_batches: list[MicroBatch], dropout: Dropout) -> Attempt:
        return grouped.forward_backward(
            self.decoder,
            self._store,
            micro_batches,
            self._schedule.size(len(micro_batches)),
            self._policies,
            dropout,
            self._gradients,
        )

    def _forward(self, micro_batches: list[MicroBatch]) -> tuple[Attempt, int]:
        attempt = grouped.evaluate(self.decoder, self._store, micro_batches, EVALUATION_GROUP)
        return attempt, -(-len(micro_batches) // EVALUATION_GROUP)

    def _next_tokens(self, cache: KeyValueCache, fresh: Fresh) -> list[int]:
        # Ranks must not come to differ in how many passes they make: rank 0 decides.
        own = torch.tensor(self._own_next_tokens(cache, fresh))
        agreed: list[int] = self._group.broadcast(own).tolist()
        return agreed

    def _of_all_layers(self, norms: Tensor) -> Tensor:
        """Those of this rank's parts -> those of the whole."""
        if not self._sharded:
            return norms
        return self._group.all_reduce_(norms.square()).sqrt()

    def _take_traffic(self) -> Traffic:
        return super()._take_traffic() + self.decoder.head.take_traffic()


def book_data_parallel(plan: Plan) -> Share:
    """Every rank has the whole model; host memory of all but the layers."""
    share = Share(range(plan.architecture.layers))
    parts.book(plan, share, _kept(plan))
    return share


def assemble_data_parallel(
    plan: Plan, base: FrozenBase, share: Share, store: Store
) -> DataParallel:
    """Join ``store`` with the parts that it shares with its like."""
    sync = gradient_sync(plan.group, plan.recipe.optim.shard)
    joined = join(plan, base, share, store, _kept(plan), sync)
    return DataParallel(joined, plan.recipe.schedule)


def _kept(plan: Plan) -> int:
    """G: micro-batches that are kept between forward and backward."""
    return plan.recipe.schedule.size(plan.recipe.size.gradient_accumulation_steps)
