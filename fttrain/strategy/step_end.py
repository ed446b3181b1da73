"""The end of a native strategy's step: totals over the ranks, checks, judge, update."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup
from fttrain.optim.clip import clip_factor
from fttrain.store.verify import VerifiedStore
from fttrain.strategy.grad_reduce import SyncStats
from fttrain.strategy.optimizer_step import Update
from fttrain.strategy.protocol import Judge, OutOfMemory, StepStats
from fttrain.util.errors import UserError


class Totals(NamedTuple):
    """Sums over all ranks, the same on every rank."""

    sums: list[float]  # the loss of a step, or the metrics of an evaluation
    targets: int  # target tokens
    tokens: int  # all tokens


class StepFinalizer:
    """The end of a step, and of any pass over the frozen base. Its methods are collective calls."""

    def __init__(
        self,
        update: Update,
        max_grad_norm: float,
        store: VerifiedStore,
        first_layer: int,
        files: Sequence[str],
        group: RankGroup,
    ) -> None:
        """``first_layer``: the index in the whole model of ``store``'s first layer; ``files``: the
        file of each layer of the whole model.
        """
        self._update, self._first_layer = update, first_layer
        self._max_grad_norm = max_grad_norm  # 0: no clipping
        self._store, self._files, self._group = store, files, group

    def totals(
        self, sums: Tensor, targets: int, tokens: int, ran_out: tuple[str, str] | None = None
    ) -> Totals:
        """Sums over all ranks. ``sums`` fp64 (sums,) on the device.

        ``ran_out``: the arguments of ``OutOfMemory`` where memory ran out on this rank. Raises, on
        every rank, UserError where a layer's checksum since the last call is not the manifest's,
        and OutOfMemory where memory ran out on any rank.
        """
        ranks, rank = self._group.world_size, self._group.rank
        by_rank = torch.zeros(2, ranks, dtype=torch.float64)
        by_rank[:, rank] = torch.tensor([self._first_damaged(), ran_out is not None])
        counts = torch.tensor([targets, tokens], dtype=torch.float64)
        local = torch.cat([counts, by_rank.flatten()])
        figures = torch.cat([sums, local.to(sums.device)])
        values = self._group.all_reduce_(figures).tolist()
        all_sums, (all_targets, all_tokens, *flags) = values[: len(sums)], values[len(sums) :]
        self._refuse_damaged(flags[:ranks])
        self._refuse_out_of_memory(flags[ranks:], ran_out or ("", ""))
        return Totals(all_sums, int(all_targets), int(all_tokens))

    def check(self) -> None:
        """Raise the errors of ``totals``, after a pass without sums."""
        self.totals(torch.zeros(1, dtype=torch.float64, device=self._group.device), 0, 0)

    def finish(
        self,
        totals: Totals,
        norms: Tensor,
        sync: SyncStats,
        lr: float,
        accept: Judge,
    ) -> StepStats:
        """Judge the step and start the update. ``totals``: of the loss sum; ``norms`` fp32 (layers
        of the whole model,): of the reduced gradients.
        """
        ((loss,), targets, tokens) = totals
        scale = 1 / max(1, targets)
        # All ranks take rank 0's norm: different cards may differ in its last bit, and ranks that
        # clip or judge differently drift apart.
        norm = float(self._group.broadcast(torch.linalg.vector_norm(norms))) * scale
        # A step without targets has no loss to judge, and nothing to learn from. A gradient that is
        # not finite would destroy the adapter, whatever the judge says.
        updated = targets > 0 and accept(loss * scale, norm) and math.isfinite(norm)
        if updated:
            self._update.start(scale * clip_factor(norm, self._max_grad_norm), lr)
        return StepStats(loss * scale, targets, tokens, norm, updated, sync)

    def _first_damaged(self) -> int:
        """1 + the first damaged layer of this rank, in the whole model; 0: none."""
        damaged = self._store.mismatched()
        return 1 + self._first_layer + min(damaged) if damaged else 0

    def _refuse_out_of_memory(self, ran_out: list[float], texts: tuple[str, str]) -> None:
        """Raise OutOfMemory with the ``texts`` of the first rank that ran out of memory.
        ``ran_out``: 1 for each rank that did.
        """
        for rank, flag in enumerate(ran_out):
            if flag:
                raise OutOfMemory(*(self._group.broadcast_str(text, rank) for text in texts))

    def _refuse_damaged(self, damaged: list[float]) -> None:
        """Raise UserError for a damaged layer. ``damaged``: each rank's ``_first_damaged``."""
        for rank, number in enumerate(damaged):
            if number:
                layer = int(number) - 1
                raise UserError(
                    f"layer {layer} on rank {rank}: its bytes on {self._group.device.type} are not "
                    f"those that {self._files[layer]} was made with (checksum); the disk, the "
                    "memory or the link is failing. Nothing was updated. `fttrain quantize` "
                    "verifies the file; after that the same command goes on from the last "
                    "checkpoint"
                )
