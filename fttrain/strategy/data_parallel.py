"""Store x grouped(G) x all_reduce: each rank passes its own micro-batches through all layers.

replicate, shard and stream are this, over different stores.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.dist import Group
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.optim.factory import OptimConfig, Optimizer
from fttrain.schedule import ScheduleConfig, generate, grouped
from fttrain.schedule.generate import Fresh, KeyValueCache
from fttrain.schedule.layer_pass import Saving
from fttrain.store import FrozenBase, Store, Traffic
from fttrain.store.verify import VerifiedStore
from fttrain.strategy.adapters import adapter_state, load_adapter_state
from fttrain.strategy.ending import Ending
from fttrain.strategy.gradients import DeviceGradients, GradientHome
from fttrain.strategy.parts import Share, book, decoder, files, gradients, saving, verified
from fttrain.strategy.protocol import Judge, StepStats
from fttrain.strategy.recipe import Plan
from fttrain.strategy.sync import gradient_sync

EVALUATION_GROUP = 8  # micro-batches that pass a layer together when nothing is kept for backward


class DataParallel:
    """A strategy whose ranks differ in nothing but the micro-batches they get."""

    def __init__(
        self,
        decoder: Decoder,
        store: VerifiedStore,
        group: Group,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        saving: Saving,
        seed: int,
        gradients: GradientHome | None = None,
        files: Sequence[str] = (),
    ) -> None:
        """``gradients``: None for all of them on the device; ``files``: of the layers on disk."""
        self.decoder = decoder
        self._store = store
        self._group = group
        self._schedule = schedule
        self._saving = saving
        self._seed = seed
        adapters = [layer.adapters for layer in decoder.layers]
        self._gradients = gradients or DeviceGradients(adapters, gradient_sync(group))
        self._optimizer = Optimizer(decoder.parameters(), optim)
        self._ending = Ending(adapters, self._optimizer, optim.max_grad_norm, store, files, group)
        self.pass_s = 0.0

    @property
    def data_parallel(self) -> tuple[int, int]:
        return self._group.rank, self._group.world_size

    def train_step(
        self, micro_batches: list[MicroBatch], step: int, lr: float, accept: Judge
    ) -> StepStats:
        self._store.start_step(step)
        self._gradients.start()
        loss_sum = grouped.forward_backward(
            self.decoder,
            self._store,
            micro_batches,
            self._schedule.size(len(micro_batches)),
            self._saving,
            lambda batch: DropoutKey(self._seed, step, batch.index),
            self._gradients,
        )
        norms, sync = self._gradients.finish()
        totals = self._totals(loss_sum, micro_batches)
        stats = self._ending.finish(totals, norms, sync, lr, accept)
        return replace(stats, traffic=self._traffic())

    def _totals(self, loss_sum: Tensor, micro_batches: list[MicroBatch]) -> tuple[float, int, int]:
        targets = sum(batch.valid_tokens for batch in micro_batches)
        tokens = sum(sum(batch.lengths) for batch in micro_batches)
        return self._ending.totals(loss_sum, targets, tokens)

    def _traffic(self) -> Traffic:
        traffic = self._store.take_traffic()
        traffic.h2d_bytes += self.decoder.head.take_h2d_bytes()
        return traffic

    def evaluate(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        started = time.perf_counter()
        loss_sum = grouped.evaluate(self.decoder, self._store, micro_batches, EVALUATION_GROUP)
        loss, targets, _ = self._totals(loss_sum, micro_batches)
        passes = -(-len(micro_batches) // EVALUATION_GROUP)
        self.pass_s = (time.perf_counter() - started) / max(1, passes)
        self._traffic()
        return loss, targets

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
    ) -> list[list[int]]:
        own = generate.whole_model(self.decoder, self._store)

        def agreed(base: KeyValueCache, fresh: Fresh) -> list[int]:
            # Ranks must not come to differ in how many passes they make: rank 0 decides.
            tokens: list[int] = self._group.broadcast(torch.tensor(own(base, fresh))).tolist()
            return tokens

        answers = generate.greedy(prompts, max_new_tokens, stop, agreed)
        self._ending.check()
        self._traffic()
        return answers

    def adapter_state(self) -> dict[str, Tensor]:
        return adapter_state(self.decoder)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        load_adapter_state(self.decoder, state)

    def optimizer_state(self) -> dict[str, Tensor]:
        return self._optimizer.state()

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        self._optimizer.restore(state)


def book_data_parallel(plan: Plan) -> Share:
    """Every rank has the whole model; host memory of all but the layers."""
    share = Share(range(plan.architecture.layers))
    book(plan, share, _kept(plan))
    return share


def assemble_data_parallel(
    plan: Plan, base: FrozenBase, share: Share, store: Store
) -> DataParallel:
    """Join ``store`` with the parts that it shares with its like."""
    recipe = plan.recipe
    built = decoder(plan, base, share)
    return DataParallel(
        built,
        verified(plan, base, store, share.layers),
        plan.group,
        recipe.optim,
        recipe.schedule,
        saving(plan, share, _kept(plan)),
        recipe.seed,
        gradients(plan, built, gradient_sync(plan.group)),
        files(base),
    )


def _kept(plan: Plan) -> int:
    """G: micro-batches that are kept between forward and backward."""
    return plan.recipe.schedule.size(plan.recipe.size.gradient_accumulation_steps)
