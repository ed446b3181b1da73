"""Strategy deepspeed: steps, evaluation and generation of a rank under ZeRO.

The frozen base, the data, the adapters' initial values, the dropout masks and the loss are those of
the native strategies. The layers are transformers'; their order and placement are DeepSpeed's.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fttrain.data.batch import IGNORE, MicroBatch, collate
from fttrain.data.config import ROW_MULTIPLE
from fttrain.memory.advice import explain_out_of_memory
from fttrain.memory.ledger import Reservation
from fttrain.model.linears import DropoutKey
from fttrain.objective.metrics import METRICS
from fttrain.store import FrozenBase, Traffic
from fttrain.store.loading import Progress
from fttrain.strategy.context import BuildContext
from fttrain.strategy.deepspeed import engine, model, state
from fttrain.strategy.deepspeed.settings import Settings
from fttrain.strategy.grad_reduce import SyncStats
from fttrain.strategy.optimizer_step import UpdateStats
from fttrain.strategy.protocol import EvaluationSums, Judge, StepStats


class DeepSpeed:
    """A rank under ZeRO. ``Strategy`` documents the methods."""

    def __init__(
        self, context: BuildContext, base: FrozenBase, settings: Settings, progress: Progress
    ) -> None:
        self._context, self._group = context, context.group
        self._seed = context.spec.seed
        self.reservations: Sequence[Reservation] = context.ledger.reservations
        self.pass_s = 0.0
        engine.quiet()
        self._backend = engine.join_ranks(context.group.device)

        def partition(layer: nn.Module) -> None:
            if settings.stage == 3:
                engine.partition_layer(layer, settings.values, context.dtype)

        self._model = model.load(context, base, progress, partition)
        self._engine = engine.Engine(
            self._model,
            state.parameter_groups(self._trained, context.spec),
            context.spec.optim,
            settings.values,
            settings.offload_optimizer,
        )
        if context.spec.lora.r:  # masters from values that were not rounded to the compute dtype
            self._engine.set_masters(self._trained, model.initial_adapters(context))
        self._backend.take()  # traffic of no step

    @property
    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._model.trained())

    @property
    def data_parallel(self) -> tuple[int, int]:
        return self._group.rank, self._group.world_size

    def train_step(
        self, micro_batches: list[MicroBatch], step: int, lr: float, accept: Judge
    ) -> StepStats:
        group = self._group
        counts = [[batch.valid_tokens, sum(batch.lengths)] for batch in micro_batches]
        local_counts = torch.tensor(counts).sum(0).to(group.device)
        targets, tokens = group.all_reduce_(local_counts).tolist()
        scale = 1 / max(1, targets)
        total = torch.zeros((), dtype=torch.float64, device=group.device)
        with self._explain_out_of_memory():
            for number, batch in enumerate(micro_batches, 1):
                self._model.set_dropout_key(DropoutKey(self._seed, step, batch.index))
                loss = self._run(batch, training=True)
                total += loss.detach()
                self._engine.backward(loss * scale, last=number == len(micro_batches))
        loss_mean = float(group.all_reduce_(total)) * scale
        norm = self._engine.grad_norm()
        moved = self._backend.take()
        # Same rule as in native strategies: a step without targets has nothing to learn from, a
        # gradient that is not finite destroys the weights.
        updated = targets > 0 and accept(loss_mean, norm) and math.isfinite(norm)
        with self._explain_out_of_memory():
            self._engine.step(lr) if updated else self._engine.skip_step()
        updating = self._backend.take()
        return StepStats(
            loss_mean,
            targets,
            tokens,
            norm,
            updated,
            SyncStats(moved.sum_bytes, moved.sum_s),
            Traffic(gather_bytes=moved.gather_bytes),
            UpdateStats(optim_gather_bytes=updating.gather_bytes),
        )

    def resize(self, pieces: int) -> None:
        """Do nothing: the engine learns from each ``backward`` whether it is the step's last."""

    def evaluate(self, micro_batches: list[MicroBatch]) -> EvaluationSums:
        started = time.perf_counter()
        # The metrics' sums, then the target tokens
        total = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=self._group.device)
        with self._explain_out_of_memory(), torch.no_grad():
            for batch in micro_batches:
                total[:-1] += self._run(batch, training=False)
                total[-1] += batch.valid_tokens
        *sums, targets = self._group.all_reduce_(total).tolist()
        self.pass_s = (time.perf_counter() - started) / max(1, len(micro_batches))
        self._backend.take()
        return EvaluationSums(int(targets), dict(zip(METRICS, sums, strict=True)))

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
    ) -> list[list[int]]:
        # No key-value cache: all tokens pass again for each new one. DeepSpeed gathers whole layers
        # in any case, and the answers are short.
        answers: list[list[int]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        with self._explain_out_of_memory():
            for _ in range(max_new_tokens):
                if not unfinished:
                    break
                chosen = self._next_tokens([prompts[i] + answers[i] for i in unfinished])
                for i, token in zip(list(unfinished), chosen, strict=True):
                    if token in stop:
                        unfinished.remove(i)
                    else:
                        answers[i].append(token)
        self._backend.take()
        return answers

    def _next_tokens(self, texts: list[list[int]]) -> list[int]:
        """The most likely next token of each text. Rank 0 decides, so that all ranks make the same
        number of passes.
        """
        batch = collate([(ids, [IGNORE] * len(ids)) for ids in texts], 0)
        ends = (torch.tensor(batch.lengths).cumsum(0) - 1).tolist()
        logits = self._run(batch, ends, training=False)
        chosen: list[int] = self._group.broadcast(logits.argmax(-1).cpu()).tolist()
        return chosen

    def _run(self, batch: MicroBatch, tokens: list[int] | None = None, *, training: bool) -> Tensor:
        """The model's output for a micro-batch. One without documents is replaced by padding: every
        rank must take part in gathers and reductions.
        """
        padded = batch.padded() if batch.lengths else _blank(batch)
        result: Tensor = self._engine.run(padded.to(self._group.device), tokens, training=training)
        return result

    def _explain_out_of_memory(self) -> AbstractContextManager[None]:
        return explain_out_of_memory(self.reservations, self._group.rank, self._group.device)

    def adapter_state(self) -> dict[str, Tensor]:
        return self._engine.masters(self._trained)

    def load_adapter_state(self, values: dict[str, Tensor]) -> None:
        state.check_fit(self._trained, values)
        self._engine.set_masters(self._trained, values)

    def optimizer_state(self) -> dict[str, Tensor]:
        return state.optimizer_state(self._context, self._engine, self._trained)

    def load_optimizer_state(self, values: dict[str, Tensor]) -> None:
        state.load_optimizer_state(self._context, self._engine, self._trained, values)


def _blank(batch: MicroBatch) -> MicroBatch:
    """A document of zeros without targets, in place of ``batch``, which has no documents."""
    zeros = torch.zeros(ROW_MULTIPLE, dtype=torch.int64)
    return replace(
        batch,
        input_ids=zeros,
        targets=torch.full_like(zeros, IGNORE),
        position_ids=zeros,
        lengths=(ROW_MULTIPLE,),
    )
