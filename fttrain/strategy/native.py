"""Base class of native strategies: the sequence of a step, an evaluation and a generation.

The subclasses (``data_parallel``, ``pipeline_stage``) divide the compute among the ranks.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.advice import explain_out_of_memory, out_of_memory_advice
from fttrain.memory.ledger import Reservation
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.objective.metrics import METRICS
from fttrain.optim.config import OptimConfig
from fttrain.optim.optimizer import Optimizer
from fttrain.schedule import generate, layer_pass
from fttrain.schedule.activations import Policies
from fttrain.schedule.generate import KeyValueCache, NewTokens
from fttrain.schedule.step_runner import Dropout, StepRunner
from fttrain.store import FrozenBase, Store, Traffic
from fttrain.store.verify import VerifiedStore
from fttrain.strategy import trainable_state
from fttrain.strategy.adapters_io import (
    adapter_state,
    assemble,
    has_all,
    holders,
    load_adapter_state,
)
from fttrain.strategy.context import BuildContext
from fttrain.strategy.grad_reduce import GradientSync
from fttrain.strategy.gradients import GradientBuffers
from fttrain.strategy.model_slice import (
    ModelSlice,
    build_decoder,
    build_policies,
    layer_files,
    verified_store,
)
from fttrain.strategy.optimizer_step import DeviceUpdate, HostUpdate, Update
from fttrain.strategy.protocol import EvaluationSums, Judge, OutOfMemory, StepStats
from fttrain.strategy.step_end import StepFinalizer, Totals


@dataclass(frozen=True)
class StrategyParts:
    """The parts of one rank's strategy."""

    decoder: Decoder
    store: VerifiedStore
    group: RankGroup
    optim: OptimConfig
    policies: Policies
    gradients: GradientBuffers
    seed: int  # of the run
    files: Sequence[str] = ()  # the file of each layer of the whole model
    reservations: Sequence[Reservation] = ()  # this rank's memory on device and host


def build_parts(
    context: BuildContext,
    base: FrozenBase,
    model_slice: ModelSlice,
    store: Store,
    micro_batches: int,
    sync: GradientSync,
) -> StrategyParts:
    """Load embedding and head, and build the parts around ``store``. ``micro_batches``: the most in
    flight.
    """
    decoder = build_decoder(context, base, model_slice)
    return StrategyParts(
        decoder,
        verified_store(context, base, store, model_slice.layers),
        context.group,
        context.spec.optim,
        build_policies(context, model_slice, micro_batches),
        trainable_state.gradients(context, decoder, sync),
        context.spec.seed,
        layer_files(base),
        context.ledger.reservations,
    )


class NativeStrategy(ABC):
    """A strategy whose schedule calls the layers itself. ``Strategy`` documents its methods."""

    def __init__(self, parts: StrategyParts) -> None:
        self.decoder, self.reservations = parts.decoder, parts.reservations
        self.pass_s = 0.0
        self._store, self._group, self._policies = parts.store, parts.group, parts.policies
        self._gradients, self._seed = parts.gradients, parts.seed
        layers = self.decoder.layers
        adapters = [layer.adapters for layer in layers]
        parameters = [(layer.flat, layer.layout.local_sections()) for layer in adapters]
        self._optimizer = Optimizer(parameters, parts.optim, layers[0].index)
        self.update: Update = (
            HostUpdate(adapters, self._optimizer, self._group.device)
            if parts.optim.offload
            else DeviceUpdate(adapters, self._optimizer)
        )
        self._finalizer = StepFinalizer(
            self.update,
            parts.optim.max_grad_norm,
            parts.store,
            layers[0].index,
            parts.files,
            parts.group,
        )
        if "m" in adapters[0].layout.names:
            self._start_magnitudes()

    def _start_magnitudes(self) -> None:
        """Initialise DoRA's magnitudes from the frozen weights: one pass over the layers."""
        for layer in layer_pass.iterate_layers(self.decoder, self._store, range(len(self._store))):
            frozen = self.decoder.layers[layer].state.frozen
            assert frozen is not None
            self.decoder.layers[layer].adapters.start_magnitudes(frozen)
        self._finalizer.check()
        self._store.take_traffic()  # traffic of no step

    @abstractmethod
    def _forward_backward(self, micro_batches: list[MicroBatch], dropout: Dropout) -> StepRunner:
        """Forward and backward of a step. Return the runner, with this rank's part of the loss sum
        and whether memory ran out.
        """

    @abstractmethod
    def _forward(self, micro_batches: list[MicroBatch]) -> tuple[StepRunner, int]:
        """Forward of an evaluation. Return the runner, with this rank's part of the metrics' sums
        and whether memory ran out, and the number of passes over the layers.
        """

    @abstractmethod
    def _next_tokens(self, cache: KeyValueCache, fresh: NewTokens) -> list[int]:
        """The most likely next token of each prompt, the same on every rank."""

    def _counted(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches whose tokens this rank counts: each one is counted by one rank."""
        return micro_batches

    def _of_all_layers(self, norms: Tensor) -> Tensor:
        """Gradient norms fp32 (layers of this rank,) -> (layers of the whole model,)."""
        return norms

    def _take_traffic(self) -> Traffic:
        """This rank's traffic since the last call."""
        by_policy = [policy.take_traffic() for policy in dict.fromkeys(self._policies)]
        return sum(by_policy, self._store.take_traffic())

    def train_step(
        self, micro_batches: list[MicroBatch], step: int, lr: float, accept: Judge
    ) -> StepStats:
        self._store.start_step(step)
        self._gradients.start()
        with self._explain_out_of_memory():
            runner = self._forward_backward(
                micro_batches, lambda batch: DropoutKey(self._seed, step, batch.index)
            )
        norms, sync = self._gradients.finish()
        try:
            totals = self._totals(runner.loss_sum.view(1), micro_batches, runner.ran_out)
        except OutOfMemory:
            self._take_traffic()  # traffic of the failed attempt
            raise
        norms = self._of_all_layers(norms)
        stats = self._finalizer.finish(totals, norms, sync, lr, accept)
        return replace(stats, traffic=self._take_traffic(), update=self.update.take_stats())

    def resize(self, pieces: int) -> None:
        for policy in dict.fromkeys(self._policies):
            policy.resize(pieces)

    def evaluate(self, micro_batches: list[MicroBatch]) -> EvaluationSums:
        started = time.perf_counter()
        with self._explain_out_of_memory():
            runner, passes = self._forward(micro_batches)
        try:
            totals = self._totals(runner.metric_sums, micro_batches, runner.ran_out)
        finally:
            self._take_traffic()  # traffic of no step
        self.pass_s = (time.perf_counter() - started) / max(1, passes)
        return EvaluationSums(totals.targets, dict(zip(METRICS, totals.sums, strict=True)))

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
    ) -> list[list[int]]:
        with self._explain_out_of_memory():
            answers = generate.greedy(prompts, max_new_tokens, stop, self._next_tokens)
        self._finalizer.check()
        self._take_traffic()
        return answers

    def _explain_out_of_memory(self) -> AbstractContextManager[None]:
        return explain_out_of_memory(self.reservations, self._group.rank, self._group.device)

    def _totals(self, sums: Tensor, micro_batches: list[MicroBatch], ran_out: str = "") -> Totals:
        """Totals over all ranks. ``ran_out``: the allocator's message where memory ran out on this
        rank.
        """
        counted = self._counted(micro_batches)
        targets = sum(batch.valid_tokens for batch in counted)
        tokens = sum(sum(batch.lengths) for batch in counted)
        group, advice = self._group, None
        if ran_out:
            advice = out_of_memory_advice(self.reservations, group.rank, group.device, ran_out)
        return self._finalizer.totals(sums, targets, tokens, advice)

    def adapter_state(self) -> dict[str, Tensor]:
        self.update.settle()
        return adapter_state(self.decoder, self._group)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        self.update.settle()
        load_adapter_state(self.decoder, state)

    def optimizer_state(self) -> dict[str, Tensor]:
        self.update.settle()
        local = self._optimizer.state()
        if has_all(self.decoder):
            return local
        return assemble(local, holders(self.decoder, self._group))

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        self.update.settle()
        self._optimizer.restore(state)
