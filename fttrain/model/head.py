"""The frozen ends of the model: token embedding, and final norm + head + cross entropy in chunks.

The head is frozen, so its backward is the gradient of the hidden states alone. It is taken at once,
chunk by chunk of tokens: no more than one chunk of logits ever exists, and tokens without a target
never reach the head.

Legend: N tokens, M tokens that have a target, C hidden width, V vocabulary.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.data.batch import ROW_MULTIPLE, moved
from fttrain.model.functions import rms_norm, rms_norm_backward
from fttrain.model.projection import Projection
from fttrain.store import Traffic
from fttrain.util.units import round_up

CHUNK_BYTES = (
    96 * 1024**2
)  # of logits in flight: fp32 probabilities and their copy in the compute dtype


@dataclass(frozen=True)
class Embedding:
    """Token ids -> hidden states. The table may stay in host memory: only rows that are looked up
    go to ``device``.
    """

    weight: Tensor  # (V, C), on the host or on ``device``
    scale: float = 1.0
    device: torch.device | None = None  # None: the table's

    def __call__(self, input_ids: Tensor) -> Tensor:
        """int64 (N,) on any device -> (N, C) on ``device``."""
        home, device = self.weight.device, self.device or self.weight.device
        rows = self.weight.new_empty(
            (len(input_ids), self.weight.shape[1]), pin_memory=home != device
        )
        torch.index_select(self.weight, 0, moved(input_ids, home), out=rows)
        hidden = rows.to(device, non_blocking=True)
        return hidden if self.scale == 1.0 else hidden * self.scale


class Head:
    """Final norm and output projection."""

    def __init__(
        self,
        norm: Tensor,
        projection: Projection,
        eps: float,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
    ) -> None:
        self.norm = norm  # (C,)
        self.projection = projection
        self.eps = eps
        self.logit_scale = logit_scale
        # Weight of each token's squared log-sum-exp in what is minimised, which keeps logits from
        # drifting (Chowdhery et al. 2022). Losses are given without it.
        self.z_loss = z_loss
        # One chunk's logits (m, V) in the compute dtype and probabilities fp32 (m, V). They are the
        # largest tensors of a step: making them anew each time pages in and scatters memory.
        self._scratch: tuple[Tensor, Tensor] | None = None

    def brought(self) -> AbstractContextManager[None]:
        """Have the projection on the device, once for all micro-batches that use it together.
        ``loss`` and ``logits`` are only called inside.
        """
        return self.projection.brought()

    def take_traffic(self) -> Traffic:
        """Of a streamed projection, since the last call."""
        return self.projection.take_traffic()

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(N, C) -> (N, V) in the compute dtype: for a few tokens, in generation."""
        logits = hidden.new_empty(len(hidden), self.projection.vocabulary)
        self.projection.project(rms_norm(hidden, self.norm, self.eps), logits)
        return logits * self.logit_scale

    def loss(self, hidden: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
        """Sum of -log p(target) over the tokens that have one, fp64 scalar. ``hidden`` (N, C),
        ``targets`` int64 (N,); ``trained`` int64 (M,): the places of those tokens.
        """
        return self._loss(hidden, targets, trained, want_gradient=False)[0]

    def loss_and_gradient(
        self, hidden: Tensor, targets: Tensor, trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``loss``, and the gradient of what is minimised with respect to ``hidden`` (N, C)."""
        return self._loss(hidden, targets, trained, want_gradient=True)

    @torch.no_grad()
    def _loss(
        self, hidden: Tensor, targets: Tensor, trained: Tensor, want_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        grad = torch.zeros_like(hidden) if want_gradient else hidden
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        form = self.projection
        rows = chunk_rows(form.vocabulary, form.dtype, len(hidden), form.chunk_factor)
        self._make_room(rows)
        for tokens in trained.split(rows):
            x = hidden[tokens]
            normed = rms_norm(x, self.norm, self.eps)
            loss, grad_normed = self._chunk(normed, targets[tokens], want_gradient)
            total += loss
            if grad_normed is not None:
                grad[tokens] = rms_norm_backward(grad_normed, x, self.norm, self.eps)
        return total, grad

    def _chunk(
        self, normed: Tensor, targets: Tensor, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One chunk (m, C): sum of its losses, and the gradient of ``normed``."""
        logits, probabilities = self._buffers(len(targets))
        self.projection.project(_padded(normed, len(logits)), logits)
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        loss = cross_entropy_(
            logits, probabilities, targets, self.z_loss, self.logit_scale, want_gradient
        )
        if not want_gradient:
            return loss, None
        return loss, self.projection.project_back(logits)[: len(targets)]

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """The scratch tensors for ``rows`` tokens, rounded up."""
        assert self._scratch is not None
        rows = round_up(rows, ROW_MULTIPLE)
        return self._scratch[0][:rows], self._scratch[1][:rows]

    def _make_room(self, rows: int) -> None:
        """Have scratch tensors of ``rows`` rows at least."""
        if self._scratch is not None and len(self._scratch[0]) >= rows:
            return
        self._scratch = None  # gone before larger ones are made
        shape, device = (rows, self.projection.vocabulary), self.norm.device
        logits = torch.empty(shape, dtype=self.projection.dtype, device=device)
        self._scratch = logits, torch.empty(shape, dtype=torch.float32, device=device)


def cross_entropy_(
    logits: Tensor,
    probabilities: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    want_gradient: bool = True,
) -> Tensor:
    """Sum of -log p(target) over ``targets`` int64 (m,), fp64 scalar.

    ``logits`` (rows, V), scaled already, in any dtype; rows after the m-th are padding. They become
    the gradient of what is minimised (``Head``) with respect to what the projection gave; without
    ``want_gradient`` they stay. ``probabilities`` fp32 (rows, V) is scratch.
    """
    pieces = logits.split(ROW_MULTIPLE), probabilities.split(ROW_MULTIPLE)
    for some, into in zip(*pieces, strict=True):  # softmax copies all it is given to fp32
        torch.softmax(some, dim=-1, dtype=torch.float32, out=into)
    rows = torch.arange(len(targets), device=targets.device)
    # A target less likely than fp32 can say counts as 87 nats; its gradient is exact anyway.
    likelihood = probabilities[rows, targets].clamp_min_(torch.finfo(torch.float32).tiny)
    log_likelihood = likelihood.log_()
    loss = -log_likelihood.sum(dtype=torch.float64)
    if not want_gradient:
        return loss
    if z_loss:
        # A token's log-sum-exp is the logit less the log-probability of any word: the target's.
        log_sum_exp = logits[rows, targets].float() - log_likelihood
        probabilities[: len(targets)] *= (1 + 2 * z_loss * log_sum_exp)[:, None]
    probabilities[rows, targets] -= 1
    if logit_scale != 1.0:
        probabilities *= logit_scale
    logits.copy_(probabilities)
    return loss


def chunk_rows(vocabulary: int, dtype: torch.dtype, tokens: int, factor: int = 1) -> int:
    """Tokens of a chunk, a multiple of ROW_MULTIPLE: CHUNK_BYTES times ``factor`` of logits, and no
    more than a micro-batch of ``tokens`` can fill.
    """
    rows = factor * CHUNK_BYTES // (vocabulary * (dtype.itemsize + 4))
    rows = min(rows // ROW_MULTIPLE * ROW_MULTIPLE, round_up(tokens, ROW_MULTIPLE))
    return max(rows, ROW_MULTIPLE)


def chunk_bytes(vocabulary: int, dtype: torch.dtype, rows: int, projecting_bytes: int = 0) -> int:
    """What a chunk of ``rows`` tokens takes on the device: logits and fp32 probabilities; beside
    them softmax's fp32 copy of ROW_MULTIPLE rows or, at another time, ``projecting_bytes``.
    """
    copied_bytes = 0 if dtype == torch.float32 else 4 * vocabulary * ROW_MULTIPLE
    logits_bytes = vocabulary * rows * (dtype.itemsize + 4)
    return logits_bytes + max(copied_bytes, projecting_bytes)


def _padded(x: Tensor, rows: int) -> Tensor:
    """(m, C) -> (rows, C), zeros after row m."""
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))
