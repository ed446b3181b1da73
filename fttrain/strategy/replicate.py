"""replicate: ResidentStore x grouped(G) x all_reduce. Only gradients travel between ranks."""

import math

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.dist import Group
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.optim.factory import OptimConfig, Optimizer
from fttrain.schedule import generate, grouped
from fttrain.schedule.grouped import ScheduleConfig
from fttrain.store import Store
from fttrain.strategy.adapters import adapter_state, load_adapter_state
from fttrain.strategy.protocol import Judge, StepStats
from fttrain.strategy.sync import AllReduceSync

EVALUATION_GROUP = 4  # micro-batches that pass a layer together when nothing is kept for backward


class Replicate:
    """A strategy over a store that needs no other rank's help."""

    def __init__(
        self,
        decoder: Decoder,
        store: Store,
        group: Group,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        activations: str,
        seed: int,
    ) -> None:
        self.decoder = decoder
        self._store = store
        self._group = group
        self._optim = optim
        self._schedule = schedule
        self._activations = activations
        self._seed = seed
        self._sync = AllReduceSync(group)
        self._optimizer = Optimizer(decoder.parameters(), optim)

    def train_step(
        self, micro_batches: list[MicroBatch], step: int, lr: float, accept: Judge
    ) -> StepStats:
        for layer in self.decoder.layers:
            layer.adapters.grad.zero_()
        micro_batches = [batch.to(self._group.device) for batch in micro_batches]
        loss_sum = grouped.forward_backward(
            self.decoder,
            self._store,
            micro_batches,
            self._schedule.size(len(micro_batches)),
            self._activations,
            lambda batch: DropoutKey(self._seed, step, batch.index),
            lambda layer: self._sync.launch(self.decoder.layers[layer].adapters.grad),
        )
        totals = self._totals(loss_sum, micro_batches)
        sync = self._sync.wait()
        loss, targets, tokens = totals.tolist()
        scale = 1 / max(1.0, targets)
        grads = [layer.adapters.grad for layer in self.decoder.layers]
        norm = float(torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))) * scale
        # A step without any target has no loss to judge, and nothing to learn from. A gradient that
        # is not finite would destroy the adapter, whatever the judge thinks of it.
        updated = targets > 0 and accept(loss * scale, norm) and math.isfinite(norm)
        if updated:
            self._update(grads, scale, norm, lr)
        return StepStats(loss * scale, int(targets), int(tokens), norm, updated, sync)

    def _totals(self, loss_sum: Tensor, micro_batches: list[MicroBatch]) -> Tensor:
        """fp64 (3,): loss sum, target tokens and all tokens, over all ranks."""
        targets = sum(batch.valid_tokens for batch in micro_batches)
        tokens = sum(sum(batch.lengths) for batch in micro_batches)
        totals = torch.stack([loss_sum, loss_sum.new_tensor(targets), loss_sum.new_tensor(tokens)])
        return self._group.all_reduce_(totals)

    def _update(self, grads: list[Tensor], scale: float, norm: float, lr: float) -> None:
        clip = self._optim.max_grad_norm
        # as torch's clip_grad_norm_
        factor = scale * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        for grad in grads:
            grad.mul_(factor)
        self._optimizer.step(lr)
        for layer in self.decoder.layers:
            layer.adapters.refresh()

    def evaluate(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        micro_batches = [batch.to(self._group.device) for batch in micro_batches]
        loss_sum = grouped.evaluate(self.decoder, self._store, micro_batches, EVALUATION_GROUP)
        totals = self._totals(loss_sum, micro_batches)
        return float(totals[0]), int(totals[1])

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
    ) -> list[list[int]]:
        return generate.greedy(self.decoder, self._store, prompts, max_new_tokens, stop)

    def adapter_state(self) -> dict[str, Tensor]:
        return adapter_state(self.decoder)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        load_adapter_state(self.decoder, state)

    def optimizer_state(self) -> dict[str, Tensor]:
        return self._optimizer.state()

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        self._optimizer.restore(state)
