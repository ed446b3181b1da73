"""What every native strategy does once backward has run: meet, check, judge, update."""

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
    """The end of a step, and of any pass over the frozen base. Every rank calls it."""

    def __init__(
        self,
        update: Update,
        max_grad_norm: float,
        store: VerifiedStore,
        first_layer: int,
        files: Sequence[str],
        group: RankGroup,
    ) -> None:
        """``first_layer``: of ``store``'s, among those of the whole model; ``files``: where each of
        those lies on disk.
        """
        self._update, self._first_layer = update, first_layer
        self._max_grad_norm = max_grad_norm  # 0: no clipping
        self._store, self._files, self._group = store, files, group

    def totals(
        self, sums: Tensor, targets: int, tokens: int, ran_out: tuple[str, str] | None = None
    ) -> Totals:
        """Sums over all ranks. ``sums`` fp64 (sums,) on the device.

        ``ran_out``: what ``usage.ran_out`` tells where memory ran out on this rank. Raises, on
        every rank, UserError where a layer that was checked since the last call is not what the
        manifest says, and OutOfMemory where memory ran out on any.
        """
        ranks, rank = self._group.world_size, self._group.rank
        by_rank = torch.zeros(2, ranks, dtype=torch.float64)
        by_rank[:, rank] = torch.tensor([self._first_damaged(), ran_out is not None])
        own = torch.cat([torch.tensor([targets, tokens], dtype=torch.float64), by_rank.flatten()])
        figures = torch.cat([sums, own.to(sums.device)])
        values = self._group.all_reduce_(figures).tolist()
        all_sums, (all_targets, all_tokens, *found) = values[: len(sums)], values[len(sums) :]
        self._refuse_damaged(found[:ranks])
        self._refuse_short(found[ranks:], ran_out or ("", ""))
        return Totals(all_sums, int(all_targets), int(all_tokens))

    def check(self) -> None:
        """After a pass without figures: only what ``totals`` raises."""
        self.totals(torch.zeros(1, dtype=torch.float64, device=self._group.device), 0, 0)

    def finish(
        self,
        totals: Totals,
        norms: Tensor,
        sync: SyncStats,
        lr: float,
        accept: Judge,
    ) -> StepStats:
        """Judge the step and update. ``totals``: of the loss sum; ``norms`` fp32 (layers of the
        whole model,): of the summed gradients.
        """
        ((loss,), targets, tokens) = totals
        scale = 1 / max(1, targets)
        # Rank 0's for all: cards of two models may differ in its last bit, and ranks that clip or
        # judge differently drift apart.
        norm = float(self._group.broadcast(torch.linalg.vector_norm(norms))) * scale
        # A step without any target has no loss to judge, and nothing to learn from. A gradient that
        # is not finite would destroy the adapter, whatever the judge thinks of it.
        updated = targets > 0 and accept(loss * scale, norm) and math.isfinite(norm)
        if updated:
            self._update.start(scale * clip_factor(norm, self._max_grad_norm), lr)
        return StepStats(loss * scale, targets, tokens, norm, updated, sync)

    def _first_damaged(self) -> int:
        """1 + the first damaged layer of this rank, 0 for none."""
        found = self._store.mismatched()
        return 1 + self._first_layer + min(found) if found else 0

    def _refuse_short(self, found: list[float], own: tuple[str, str]) -> None:
        """``found``: of each rank whether memory ran out; the first of them tells."""
        for rank, short in enumerate(found):
            if short:
                raise OutOfMemory(*(self._group.broadcast_str(text, rank) for text in own))

    def _refuse_damaged(self, found: list[float]) -> None:
        """``found``: of each rank what ``_first_damaged`` gave."""
        for rank, number in enumerate(found):
            if number:
                layer = int(number) - 1
                raise UserError(
                    f"layer {layer} on rank {rank}: its bytes on {self._group.device.type} are not "
                    f"those that {self._files[layer]} was made with (checksum); the disk, the "
                    "memory or the link is failing. Nothing was updated. `fttrain quantize` "
                    "verifies the file; after that the same command goes on from the last "
                    "checkpoint"
                )
