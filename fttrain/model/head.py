"""The frozen ends of the model: token embedding, and final norm + head + loss in chunks.

The head is frozen, so its backward is the gradient of the hidden states alone. It is taken at once,
chunk by chunk of tokens: no more than one chunk of logits ever exists, and tokens without a target
never reach the head.

Legend: N tokens, M tokens that have a target, C hidden width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.data.batch import ROW_MULTIPLE, moved
from fttrain.model.functions import rms_norm, rms_norm_backward
from fttrain.model.projection import Projection
from fttrain.objective.metrics import metric_sums, nll, no_sums
from fttrain.objective.objective import Objective, TargetLogProbs
from fttrain.objective.supervised import SUPERVISED
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
    """Final norm, output projection and loss."""

    def __init__(
        self,
        norm: Tensor,
        projection: Projection,
        eps: float,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        objective: Objective = SUPERVISED,
    ) -> None:
        self.norm = norm  # (C,)
        self.projection = projection
        self.eps = eps
        self.logit_scale = logit_scale
        # Weight of each token's squared log-sum-exp in what is minimised, which keeps logits from
        # drifting (Chowdhery et al. 2022). Losses are given without it.
        self.z_loss = z_loss
        self.objective = objective
        # One chunk's logits (m, V) in the compute dtype and probabilities fp32 (m, V). They are the
        # largest tensors of a step: making them anew each time pages in and scatters memory.
        self._scratch: tuple[Tensor, Tensor] | None = None

    def brought(self) -> AbstractContextManager[None]:
        """Have the projection on the device, once for all micro-batches that use it together.
        The methods that use it are only called inside.
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

    def metric_sums(self, hidden: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
        """Evaluation metrics over the tokens that have a target: fp64 (metrics,). ``hidden``
        (N, C), ``targets`` int64 (N,); ``trained`` int64 (M,): the positions of those tokens.
        """
        sums = no_sums(hidden.device)
        for chunk in self._chunks(hidden, targets, trained):
            sums += metric_sums(self._log_probs(chunk))
        return sums

    def log_probs(self, hidden: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
        """log p(target) of each token that has one, fp32 (M,)."""
        chunks = self._chunks(hidden, targets, trained)
        parts = [self._log_probs(chunk) for chunk in chunks]
        return torch.cat(parts) if parts else self.norm.new_zeros(0, dtype=torch.float32)

    @torch.no_grad()
    def loss_and_gradient(
        self, hidden: Tensor, targets: Tensor, trained: Tensor, lengths: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """The objective's loss sum, fp64 scalar, and the gradient of what is minimised with respect
        to ``hidden`` (N, C). ``lengths``: tokens of each document.

        An objective whose coefficients depend on the log-probabilities takes two passes over the
        projection, cross entropy one.
        """
        if self.objective.one_pass:
            return self._gradient(hidden, targets, trained, None)
        log_probs = self.log_probs(hidden, targets, trained)  # fp32 (M,)
        pairs = TargetLogProbs(log_probs, trained, lengths)
        loss, coefficients = self.objective.loss_and_coefficients(pairs)
        _, grad = self._gradient(hidden, targets, trained, -coefficients)
        return loss, grad

    def _gradient(
        self, hidden: Tensor, targets: Tensor, trained: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy, fp64 scalar, and the gradient of ``hidden`` (N, C), each target's part
        times its weight, fp32 (M,); None: 1.
        """
        grad = torch.zeros_like(hidden)  # (N, C)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        first = 0
        for chunk in self._chunks(hidden, targets, trained):
            log_probs = self._log_probs(chunk)  # fp32 (m,)
            total += nll(log_probs)
            logits, probabilities = self._buffers(len(chunk.targets))
            count = len(chunk.targets)
            some = None if weights is None else weights[first : first + count]  # fp32 (m,)
            logit_gradient_(
                logits, probabilities, chunk.targets, log_probs, self.z_loss, self.logit_scale, some
            )
            grad_normed = self.projection.project_back(logits)[:count]  # (m, C)
            grad[chunk.tokens] = rms_norm_backward(grad_normed, chunk.x, self.norm, self.eps)
            first += count
        return total, grad

    def _chunks(self, hidden: Tensor, targets: Tensor, trained: Tensor) -> Iterator["_Chunk"]:
        """The tokens that have a target, as many at a time as the scratch tensors take."""
        form = self.projection
        rows = chunk_rows(form.vocabulary, form.dtype, len(hidden), form.chunk_factor)
        self._make_room(rows)
        for tokens in trained.split(rows):
            yield _Chunk(tokens, hidden[tokens], targets[tokens])

    @torch.no_grad()
    def _log_probs(self, chunk: "_Chunk") -> Tensor:
        """log p(target) of a chunk, fp32 (m,). Its logits and probabilities stay in the scratch
        tensors.
        """
        logits, probabilities = self._buffers(len(chunk.targets))
        normed = rms_norm(chunk.x, self.norm, self.eps)  # (m, C)
        self.projection.project(_padded(normed, len(logits)), logits)
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        return target_log_probs_(logits, probabilities, chunk.targets)

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


@dataclass(frozen=True)
class _Chunk:
    """Some tokens that have a target."""

    tokens: Tensor  # int64 (m,): their positions in the micro-batch
    x: Tensor  # (m, C): their hidden states
    targets: Tensor  # int64 (m,)


def target_log_probs_(logits: Tensor, probabilities: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of ``targets`` int64 (m,), fp32 (m,).

    ``logits`` (rows, V), scaled already, in any dtype; rows after the m-th are padding.
    ``probabilities`` fp32 (rows, V) becomes their softmax.
    """
    pieces = logits.split(ROW_MULTIPLE), probabilities.split(ROW_MULTIPLE)
    for some, into in zip(*pieces, strict=True):  # softmax copies all it is given to fp32
        torch.softmax(some, dim=-1, dtype=torch.float32, out=into)
    rows = torch.arange(len(targets), device=targets.device)
    # A target less likely than fp32 can say counts as 87 nats; its gradient is exact anyway.
    likelihood = probabilities[rows, targets].clamp_min_(torch.finfo(torch.float32).tiny)
    return likelihood.log_()


def logit_gradient_(
    logits: Tensor,
    probabilities: Tensor,
    targets: Tensor,
    log_probs: Tensor,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    weights: Tensor | None = None,
) -> None:
    """Replace ``logits`` (rows, V) by the gradient of what is minimised with respect to what the
    projection gave: w (p - onehot(target)) + 2 z lse p, for -w log p + z lse^2 of each target.

    ``probabilities`` fp32 (rows, V) and ``log_probs`` fp32 (m,): as ``target_log_probs_`` left and
    returned them; ``weights`` fp32 (m,), None: 1.
    """
    rows = torch.arange(len(targets), device=targets.device)
    factors: Tensor | float = 1.0 if weights is None else weights
    if z_loss:
        # A token's log-sum-exp is the logit less the log-probability of any word: the target's.
        log_sum_exp = logits[rows, targets].float() - log_probs  # (m,)
        probabilities[: len(targets)] *= (factors + 2 * z_loss * log_sum_exp)[:, None]
    elif weights is not None:
        probabilities[: len(targets)] *= weights[:, None]
    probabilities[rows, targets] -= factors
    if logit_scale != 1.0:
        probabilities *= logit_scale
    logits.copy_(probabilities)


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
