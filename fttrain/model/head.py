"""The frozen ends of the model: token embedding, and final norm + head + cross entropy in chunks.

The head is frozen, so its backward is the gradient of the hidden states alone. It is taken at once,
chunk by chunk of tokens: no more than one chunk of logits ever exists, and tokens without a target
never reach the head.

Legend: N tokens, M tokens that have a target, C hidden width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fttrain.data.batch import ROW_MULTIPLE
from fttrain.model.functions import rms_norm, rms_norm_backward
from fttrain.store import Traffic
from fttrain.store.lane import copy, copy_lane
from fttrain.units import round_up

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
        torch.index_select(self.weight, 0, input_ids.to(home), out=rows)
        hidden = rows.to(device, non_blocking=True)
        return hidden if self.scale == 1.0 else hidden * self.scale


class Head:
    """Final norm and output projection.

    A ``streamed`` projection stays in host memory and comes to the device for the length of
    ``brought()``, once for all micro-batches that use it together.
    """

    def __init__(
        self,
        norm: Tensor,
        weight: Tensor,
        eps: float,
        logit_scale: float = 1.0,
        streamed: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        self.norm = norm  # (C,)
        self.weight = weight  # (V, C); the embedding's tensor where they are tied
        self.eps = eps
        self.logit_scale = logit_scale
        self.streamed = streamed
        # Weight of each token's squared log-sum-exp in what is minimised, which keeps logits from
        # drifting (Chowdhery et al. 2022). Losses are given without it.
        self.z_loss = z_loss
        self._lane = copy_lane(norm.device, timed=True) if streamed else None
        self._h2d_bytes = 0
        # One chunk's logits (m, V) in the compute dtype and probabilities fp32 (m, V). They are the
        # largest tensors of a step: making them anew each time pages in and scatters memory.
        self._scratch: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def brought(self) -> Iterator[None]:
        """Have the projection on the device. ``loss`` and ``logits`` are only called inside."""
        if self._lane is None:
            yield
            return
        on_host = self.weight
        self.weight = torch.empty_like(on_host, device=self.norm.device)
        # The compute has nothing else to do meanwhile: the lane is there to time the wait.
        self._lane.run(partial(copy, self.weight, on_host)).wait()
        self._h2d_bytes += on_host.numel() * on_host.element_size()
        try:
            yield
        finally:
            self.weight = on_host

    def take_traffic(self) -> Traffic:
        """Of a streamed projection, since the last call."""
        if self._lane is None:
            return Traffic()
        moved, self._h2d_bytes = self._h2d_bytes, 0
        return Traffic(h2d_bytes=moved, wait_s=self._lane.take_wait_s())

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, C) -> (N, V) in the compute dtype: for a few tokens, in generation."""
        return rms_norm(hidden, self.norm, self.eps) @ self.weight.t() * self.logit_scale

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
        for tokens in trained.split(_chunk_rows(len(self.weight), self.weight.dtype)):
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
        torch.mm(_padded(normed, len(logits)), self.weight.t(), out=logits)
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        torch.softmax(logits, dim=-1, dtype=torch.float32, out=probabilities)
        rows = torch.arange(len(targets), device=targets.device)
        # A target less likely than fp32 can say counts as 87 nats; its gradient is exact anyway.
        likelihood = probabilities[rows, targets].clamp_min_(torch.finfo(torch.float32).tiny)
        log_likelihood = likelihood.log_()
        loss = -log_likelihood.sum(dtype=torch.float64)
        if not want_gradient:
            return loss, None
        if self.z_loss:
            # A token's log-sum-exp is the logit less the log-probability of any word: the target's.
            log_sum_exp = logits[rows, targets].float() - log_likelihood
            probabilities[: len(targets)] *= (1 + 2 * self.z_loss * log_sum_exp)[:, None]
        probabilities[rows, targets] -= 1
        if self.logit_scale != 1.0:
            probabilities *= self.logit_scale
        return loss, (logits.copy_(probabilities) @ self.weight)[: len(targets)]

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """Scratch tensors of ``rows`` rows, rounded up."""
        rows = round_up(rows, ROW_MULTIPLE)
        if self._scratch is None or len(self._scratch[0]) < rows:
            logits = self.weight.new_empty(
                max(rows, _chunk_rows(len(self.weight), self.weight.dtype)), self.weight.shape[0]
            )
            self._scratch = logits, torch.empty_like(logits, dtype=torch.float32)
        return self._scratch[0][:rows], self._scratch[1][:rows]


def chunk_bytes(vocabulary: int, dtype: torch.dtype) -> int:
    """What logits and probabilities of one chunk take on the device."""
    return _chunk_rows(vocabulary, dtype) * _row_bytes(vocabulary, dtype)


def _chunk_rows(vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, a multiple of ROW_MULTIPLE."""
    rows = CHUNK_BYTES // _row_bytes(vocabulary, dtype)
    return round_up(rows + 1 - ROW_MULTIPLE, ROW_MULTIPLE) or ROW_MULTIPLE


def _row_bytes(vocabulary: int, dtype: torch.dtype) -> int:
    """Of one token: logits in ``dtype`` and fp32 probabilities."""
    return vocabulary * (dtype.itemsize + 4)


def _padded(x: Tensor, rows: int) -> Tensor:
    """(m, C) -> (rows, C), zeros after row m."""
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))
