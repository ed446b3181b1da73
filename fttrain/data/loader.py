"""The loader: micro-batches of rows, as a pure function of (seed, step).

One optimizer step takes ``R = micro_batch_size * gradient_accumulation_steps * world_size`` rows,
the next R of the epoch's order. Micro-batch ``m = a * world_size + rank`` of the step takes the
m-th ``micro_batch_size`` of them, so the rows of a step do not depend on how they are split. The
last step of an epoch takes the remaining rows: its last micro-batches are short or empty. Every
rank has the same number of micro-batches.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fttrain.data.batch import MicroBatch, collate
from fttrain.data.dataset import Document
from fttrain.util.errors import UserError


class PackedRows(Protocol):
    """Packed rows. A row is a list of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> list[Document]: ...


class Loader:
    """The micro-batches of one rank, step after step, without end.

    ``position``: optimizer steps done; the only state that a resumed run needs. Raises UserError
    when there are no rows.
    """

    def __init__(
        self,
        rows: PackedRows,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        position: int = 0,
        shuffle: bool = True,
    ) -> None:
        for key, value in (
            ("micro_batch_size", micro_batch_size),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
        ):
            if value < 1:
                raise UserError(f"loop.{key}={value}: a whole number of 1 or more")
        if len(rows) == 0:
            raise UserError("data: no rows to train on; use more data or a smaller data.holdout")
        self._rows, self._seed, self._shuffle = rows, seed, shuffle
        self.micro_batch_size, self._accumulation = micro_batch_size, gradient_accumulation_steps
        self._rank, self._world_size = rank, world_size
        self.position = position
        self._order: tuple[int, NDArray[np.int64]] | None = None  # (epoch, its permutation)

    @property
    def rows_per_step(self) -> int:
        """Rows of a full step over all ranks."""
        return self.micro_batch_size * self._accumulation * self._world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see each row once; the last may be partial."""
        return -(-len(self._rows) // self.rows_per_step)

    def next_step(self) -> list[MicroBatch]:
        """The rank's ``gradient_accumulation_steps`` micro-batches of the next step; some may be
        empty.
        """
        epoch, step = divmod(self.position, self.steps_per_epoch)
        chosen = self._epoch_order(epoch)[
            step * self.rows_per_step : (step + 1) * self.rows_per_step
        ]
        self.position += 1
        indices = (a * self._world_size + self._rank for a in range(self._accumulation))
        return [_micro_batch(self._rows, chosen, index, self.micro_batch_size) for index in indices]

    def divide(self, pieces: int) -> None:
        """Divide each micro-batch into ``pieces`` from the next step on. A step takes the same rows
        as before. ``pieces`` divides ``micro_batch_size``.
        """
        self.micro_batch_size //= pieces
        self._accumulation *= pieces

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self._rows))
            if self._shuffle:
                # numpy guarantees RandomState's stream, so a resume after an upgrade sees the same
                # order.
                words = [self._seed & 0xFFFFFFFF, (self._seed >> 32) & 0xFFFFFFFF, epoch]
                order = np.random.RandomState(words).permutation(len(self._rows))
            self._order = epoch, order
        return self._order[1]


def evaluation_batches(
    rows: PackedRows, micro_batch_size: int, rank: int, world_size: int
) -> list[MicroBatch]:
    """The rank's micro-batches of all rows, once and in order. Every rank has the same number of
    them; the last ones may be empty.
    """
    order = np.arange(len(rows))
    rounds = -(-len(rows) // (micro_batch_size * world_size))
    indices = (a * world_size + rank for a in range(rounds))
    return [_micro_batch(rows, order, index, micro_batch_size) for index in indices]


def _micro_batch(rows: PackedRows, chosen: NDArray[np.int64], index: int, size: int) -> MicroBatch:
    members = chosen[index * size : (index + 1) * size]
    return collate([document for row in members.tolist() for document in rows[row]], index)
