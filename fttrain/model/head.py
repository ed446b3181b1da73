"""The frozen ends of the model: token embedding, and final norm + head + loss in chunks.

The head is frozen, so its backward is the gradient of the hidden states alone. It is computed at
once, chunk by chunk of tokens: no more than one chunk of logits ever exists, and tokens without a
target never reach the head.

Legend: N tokens, M tokens that have a target, m of them in a chunk, R rows of a chunk with padding,
C hidden width, V vocabulary. Tensors are in the compute dtype where no other stands beside them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.data.batch import moved
from fttrain.data.config import ROW_MULTIPLE
from fttrain.model.functions import rms_norm, rms_norm_backward
from fttrain.model.projection import Projection
from fttrain.model.token_loss import (
    add_gradient,
    logits_gradient_,
    metric_sums,
    target_log_probabilities,
)
from fttrain.objective.objective import Objective
from fttrain.objective.supervised import Supervised
from fttrain.store import Traffic
from fttrain.util.units import MIB, round_up

# Bytes of a chunk of logits: fp32 probabilities and their copy in the compute dtype
CHUNK_BYTES = 96 * MIB


@dataclass(frozen=True)
class Embedding:
    """The token embedding. Its table may be in host memory: only rows that are looked up are copied
    to ``device``.
    """

    weight: Tensor  # (V, C), on the host or on ``device``
    scale: float = 1.0  # of the hidden states
    device: torch.device | None = None  # None: the table's

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Hidden states (N, C) on ``device`` of ``input_ids`` int64 (N,), on any device."""
        table_device, device = self.weight.device, self.device or self.weight.device
        rows = self.weight.new_empty(
            (len(input_ids), self.weight.shape[1]), pin_memory=table_device != device
        )  # (N, C)
        torch.index_select(self.weight, 0, moved(input_ids, table_device), out=rows)
        hidden = rows.to(device, non_blocking=True)
        return hidden if self.scale == 1.0 else hidden * self.scale


class Head:
    """Final norm and output projection, with the loss in them."""

    def __init__(
        self,
        norm: Tensor,
        projection: Projection,
        eps: float,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        objective: Objective | None = None,
    ) -> None:
        """``objective``: the loss that is minimised; None: ``Supervised``."""
        self.norm = norm  # (C,)
        self.projection = projection
        self.eps = eps
        self.logit_scale = logit_scale
        # Weight of each token's squared log-sum-exp in what is minimised, which keeps logits from
        # drifting (Chowdhery et al. 2022). Losses are reported without it.
        self.z_loss = z_loss
        self.objective = objective or Supervised()
        # One chunk's logits (R, V) in the compute dtype and probabilities fp32 (R, V). They are the
        # largest tensors of a step: allocating them anew each time pages in and scatters memory.
        self._scratch: tuple[Tensor, Tensor] | None = None

    def on_device(self) -> AbstractContextManager[None]:
        """The projection is on the device inside, for all micro-batches that use it together.
        ``loss_and_gradient``, ``metric_sums`` and ``logits`` are only called inside.
        """
        return self.projection.on_device()

    def take_traffic(self) -> Traffic:
        """Traffic of a streamed projection since the last call."""
        return self.projection.take_traffic()

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of ``hidden`` (N, C), for the few tokens of generation."""
        logits = hidden.new_empty(len(hidden), self.projection.vocabulary)
        self.projection.project(rms_norm(hidden, self.norm, self.eps), logits)
        return logits * self.logit_scale

    @torch.no_grad()
    def loss_and_gradient(
        self, hidden: Tensor, targets: Tensor, trained: Tensor, target_counts: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Loss sum, fp64 (), and the gradient of what is minimised with respect to ``hidden``
        (N, C).

        ``targets`` int64 (N,); ``trained`` int64 (M,): the positions that have one;
        ``target_counts``: how many of them each sequence has, read by objectives without a constant
        coefficient alone.
        """
        grad = torch.zeros_like(hidden)  # (N, C)
        chunks = _HeadChunks(self, hidden, targets, trained, grad)
        return add_gradient(chunks, self.objective, target_counts, hidden.device), grad

    @torch.no_grad()
    def metric_sums(self, hidden: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
        """The sum of each of ``METRICS`` over the target tokens, fp64 (metrics,). Arguments as of
        ``loss_and_gradient``.
        """
        return metric_sums(_HeadChunks(self, hidden, targets, trained, None), hidden.device)

    def buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """A chunk's scratch: logits (R, V) and fp32 probabilities (R, V), R ``rows`` rounded up.
        Their values are undefined.
        """
        rows = round_up(rows, ROW_MULTIPLE)
        if self._scratch is None or len(self._scratch[0]) < rows:
            self._scratch = None  # freed before larger ones are allocated
            shape, device = (rows, self.projection.vocabulary), self.norm.device
            logits = torch.empty(shape, dtype=self.projection.dtype, device=device)
            self._scratch = logits, torch.empty(shape, dtype=torch.float32, device=device)
        return self._scratch[0][:rows], self._scratch[1][:rows]


class _HeadChunks:
    """``LogitChunks`` of one micro-batch, whose gradients are written into ``grad`` (N, C)."""

    def __init__(
        self, head: Head, hidden: Tensor, targets: Tensor, trained: Tensor, grad: Tensor | None
    ) -> None:
        self._head, self._hidden, self._targets, self._grad = head, hidden, targets, grad
        form = head.projection
        rows = chunk_rows(form.vocabulary, form.dtype, len(hidden), form.chunk_factor)
        head.buffers(rows)
        self._positions = trained.split(rows) if len(trained) else ()

    def __len__(self) -> int:
        return len(self._positions)

    def forward(self, chunk: int) -> Tensor:
        head, self._chunk = self._head, self._positions[chunk]
        self._x = self._hidden[self._chunk]  # (m, C)
        logits, probabilities = head.buffers(len(self._chunk))
        normed = rms_norm(self._x, head.norm, head.eps)  # (m, C)
        head.projection.project(_padded(normed, len(logits)), logits)
        if head.logit_scale != 1.0:
            logits *= head.logit_scale
        self._log_probabilities = target_log_probabilities(
            logits, probabilities, self._targets[self._chunk]
        )
        return self._log_probabilities

    def backward(self, coefficients: float | Tensor) -> None:
        assert self._grad is not None
        head, rows = self._head, len(self._chunk)
        logits, probabilities = head.buffers(rows)
        logits_gradient_(
            logits,
            probabilities,
            self._targets[self._chunk],
            self._log_probabilities,
            coefficients,
            head.z_loss,
            head.logit_scale,
        )
        grad_normed = head.projection.project_back(logits)[:rows]  # (m, C)
        self._grad[self._chunk] = rms_norm_backward(grad_normed, self._x, head.norm, head.eps)


def chunk_rows(vocabulary: int, dtype: torch.dtype, tokens: int, factor: int = 1) -> int:
    """Tokens of a chunk, a multiple of ROW_MULTIPLE: as many as ``factor`` * CHUNK_BYTES of logits
    hold, and no more than a micro-batch of ``tokens`` can fill.
    """
    rows = factor * CHUNK_BYTES // (vocabulary * (dtype.itemsize + 4))
    rows = min(rows // ROW_MULTIPLE * ROW_MULTIPLE, round_up(tokens, ROW_MULTIPLE))
    return max(rows, ROW_MULTIPLE)


def chunk_bytes(vocabulary: int, dtype: torch.dtype, rows: int, projecting_bytes: int = 0) -> int:
    """Bytes of a chunk of ``rows`` tokens on the device: logits and fp32 probabilities; beside them
    softmax's fp32 copy of ROW_MULTIPLE rows or, at another time, ``projecting_bytes``.
    """
    copied_bytes = 0 if dtype == torch.float32 else 4 * vocabulary * ROW_MULTIPLE
    logits_bytes = vocabulary * rows * (dtype.itemsize + 4)
    return logits_bytes + max(copied_bytes, projecting_bytes)


def _padded(x: Tensor, rows: int) -> Tensor:
    """``x`` (m, C) with rows of zeros appended: (rows, C)."""
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))
