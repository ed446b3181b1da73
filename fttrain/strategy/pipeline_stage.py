"""Resident layers x one_f_one_b: one stage of a pipeline, as a strategy."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.dist import Group
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.optim.factory import OptimConfig, Optimizer
from fttrain.schedule import generate
from fttrain.schedule.generate import Fresh, KeyValueCache
from fttrain.schedule.layer_pass import Saving
from fttrain.schedule.one_f_one_b import one_f_one_b
from fttrain.schedule.stage_link import DOWN, UP, StageLink
from fttrain.schedule.stage_pass import StagePass
from fttrain.store.verify import VerifiedStore
from fttrain.strategy.adapters import adapter_state, assemble, load_adapter_state, part_of
from fttrain.strategy.ending import Ending
from fttrain.strategy.gradients import DeviceGradients, GradientHome
from fttrain.strategy.protocol import Judge, StepStats
from fttrain.strategy.sync import NoSync


class PipelineStage:
    """One stage. ``decoder`` has this stage's layers, and the ends where it is first or last.

    Every rank is given the micro-batches of all ranks: it needs their shapes, the first stage the
    tokens, the last one the targets.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: VerifiedStore,
        group: Group,
        optim: OptimConfig,
        saving: Saving,
        seed: int,
        gradients: GradientHome | None = None,
        files: Sequence[str] = (),
    ) -> None:
        self.decoder = decoder
        self._store = store
        self._group = group
        self._saving = saving
        self._seed = seed
        adapters = [layer.adapters for layer in decoder.layers]
        self._gradients = gradients or DeviceGradients(adapters, NoSync())
        self._optimizer = Optimizer(decoder.parameters(), optim, decoder.layers[0].index)
        self._ending = Ending(adapters, self._optimizer, optim.max_grad_norm, store, files, group)
        self._link = StageLink(group, decoder.architecture.hidden, decoder.dtype)
        self.pass_s = 0.0

    @property
    def data_parallel(self) -> tuple[int, int]:
        return 0, 1

    def train_step(
        self, micro_batches: list[MicroBatch], step: int, lr: float, accept: Judge
    ) -> StepStats:
        self._store.start_step(step)
        self._gradients.start()
        stage = self._pass(micro_batches, lambda batch: DropoutKey(self._seed, step, batch.index))
        rank, world_size = self._group.rank, self._group.world_size
        one_f_one_b(rank, world_size, len(stage), stage.forward, stage.backward)
        stage_bytes = self._link.flush()
        own_norms, sync = self._gradients.finish()
        totals = self._totals(stage.loss_sum, micro_batches)
        stats = self._ending.finish(totals, self._all_norms(own_norms), sync, lr, accept)
        traffic = self._store.take_traffic()
        if self._link.is_last:
            traffic.h2d_bytes += self.decoder.head.take_h2d_bytes()
        return replace(stats, traffic=traffic, stage_bytes=stage_bytes)

    def _pass(
        self, micro_batches: list[MicroBatch], dropout: Callable[[MicroBatch], DropoutKey | None]
    ) -> StagePass:
        """What this stage does in a pass of those that have tokens."""
        some = [batch for batch in micro_batches if batch.lengths]
        return StagePass(
            self.decoder, self._store, self._link, self._saving, self._gradients, some, dropout
        )

    def _totals(self, loss_sum: Tensor, micro_batches: list[MicroBatch]) -> tuple[float, int, int]:
        """All ranks have the same micro-batches: one of them counts."""
        counted = micro_batches if self._link.is_first else []
        targets = sum(batch.valid_tokens for batch in counted)
        tokens = sum(sum(batch.lengths) for batch in counted)
        return self._ending.totals(loss_sum, targets, tokens)

    def _all_norms(self, own: Tensor) -> Tensor:
        """fp32 (layers of this stage,) -> (layers of the model,): exact, all others add zeros."""
        norms = own.new_zeros(self.decoder.architecture.layers)
        first = self.decoder.layers[0].index
        norms[first : first + len(own)] = own
        return self._group.all_reduce_(norms)

    def evaluate(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        started = time.perf_counter()
        stage = self._pass(micro_batches, lambda batch: None)
        for number in range(len(stage)):
            stage.evaluate(number)
        self._link.flush()
        loss, targets, _ = self._totals(stage.loss_sum, micro_batches)
        self.pass_s = (time.perf_counter() - started) / max(1, len(stage))
        return loss, targets

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
    ) -> list[list[int]]:
        answers = generate.greedy(prompts, max_new_tokens, stop, self._next_tokens)
        self._ending.check()
        return answers

    def _next_tokens(self, cache: KeyValueCache, fresh: Fresh) -> list[int]:
        if self._link.is_first:
            hidden = self.decoder.embed(fresh.tokens)
        else:
            hidden = self._link.receive(len(fresh.tokens), DOWN).tensor()
        hidden = generate.through_layers(self.decoder, self._store, cache, fresh, hidden)
        chosen = [0] * len(fresh.ends)
        if self._link.is_last:
            chosen = generate.most_likely(self.decoder, fresh, hidden)
        else:
            self._link.send(hidden, UP)
        tokens = self._group.broadcast(torch.tensor(chosen), self._group.world_size - 1).tolist()
        self._link.flush()
        return tokens

    def adapter_state(self) -> dict[str, Tensor]:
        return assemble(adapter_state(self.decoder), self._group)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        load_adapter_state(self.decoder, part_of(state, self.decoder))

    def optimizer_state(self) -> dict[str, Tensor]:
        return assemble(self._optimizer.state(), self._group)

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        self._optimizer.restore(state)
