"""What every native strategy does once backward has run: meet, check, judge, update."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup
from fttrain.optim.clip import clip_factor
from fttrain.store.verify import VerifiedStore
from fttrain.strategy.grad_reduce import SyncStats
from fttrain.strategy.optimizer_step import Update
from fttrain.strategy.protocol import Judge, OutOfMemory, StepStats
from fttrain.util.errors import UserError


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
        self._update, self._max_grad_norm, self._first_layer = update, max_grad_norm, first_layer
        self._store, self._files, self._group = store, files, group

    def totals(
        self, sums: Tensor, targets: int, tokens: int, advice: tuple[str, str] | None = None
    ) -> tuple[list[float], int, int]:
        """``sums`` fp64 (n,), target tokens and all tokens, each over all ranks.

        ``advice``: of ``out_of_memory_advice``, where memory ran out on this rank. Raises, on every
        rank, UserError where a layer that was checked since the last call differs from the
        manifest, and OutOfMemory where memory ran out on any.
        """
        ranks, rank = self._group.world_size, self._group.rank
        by_rank = torch.zeros(2, ranks, dtype=torch.float64)
        by_rank[:, rank] = torch.tensor([self._first_damaged(), advice is not None])
        counts = torch.tensor([targets, tokens], dtype=torch.float64)
        local = torch.cat([counts, by_rank.flatten()]).to(sums.device)
        totals: list[float] = self._group.all_reduce_(torch.cat([sums, local])).tolist()
        reduced, totals = totals[: len(sums)], totals[len(sums) :]
        all_targets, all_tokens, *flags = totals
        self._refuse_damaged(flags[:ranks])
        self._refuse_short(flags[ranks:], advice or ("", ""))
        return reduced, int(all_targets), int(all_tokens)

    def check(self) -> None:
        """After a pass without figures: only what ``totals`` raises."""
        self.totals(torch.zeros(0, dtype=torch.float64, device=self._group.device), 0, 0)

    def finish(
        self,
        totals: tuple[float, int, int],
        norms: Tensor,
        sync: SyncStats,
        lr: float,
        accept: Judge,
    ) -> StepStats:
        """Judge the step and update. ``norms`` fp32 (layers of the whole model,): of the summed
        gradients.
        """
        loss, targets, tokens = totals
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
