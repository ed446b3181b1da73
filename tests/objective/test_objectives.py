"""Objectives through the head's two passes, against autograd over full logits."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fttrain.data.batch import IGNORE
from fttrain.model import head as head_module
from fttrain.model.head import Head
from fttrain.model.projection import (
    Projection,
    QuantizedHead,
    ResidentHead,
    StreamedHead,
    tiled_format,
)
from fttrain.objective import metrics
from fttrain.objective.metrics import EvaluationSums
from fttrain.objective.objective import Objective, TargetLogProbs
from fttrain.objective.supervised import SUPERVISED, Supervised
from fttrain.quant.config import QuantConfig

LENGTHS, WIDTH, VOCABULARY, EPS = (11, 1, 20, 9), 64, 97, 1e-6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SequenceSigmoid:
    """-log sigmoid of each document's summed log-probability, shifted: coefficients depend on all
    tokens of a document.
    """

    one_pass: bool = False

    def documents(self, targets: TargetLogProbs) -> Tensor:
        """Summed log-probability of each document."""
        sums = torch.zeros(len(targets.lengths), dtype=torch.float64)
        return sums.index_add(0, targets.documents(), targets.log_probs.double())

    def loss_and_coefficients(self, targets: TargetLogProbs) -> tuple[Tensor, Tensor]:
        sums = self.documents(targets) + 30
        coefficients = (torch.sigmoid(sums) - 1)[targets.documents()]
        return -torch.nn.functional.logsigmoid(sums).sum(), coefficients.float()


@dataclass(frozen=True)
class Focal:
    """-(1 - p)^2 log p, by token."""

    one_pass: bool = False

    def loss_and_coefficients(self, targets: TargetLogProbs) -> tuple[Tensor, Tensor]:
        log_p = targets.log_probs.double().requires_grad_()
        with torch.enable_grad():
            loss = -((1 - log_p.exp()) ** 2 * log_p).sum()
        (coefficients,) = torch.autograd.grad(loss, log_p)
        return loss.detach(), coefficients.float()


def projection_of(form: str, weight: Tensor) -> Projection:
    if form == "quantized":
        return QuantizedHead(weight, tiled_format(*weight.shape, QuantConfig(), weight.dtype), CPU)
    return StreamedHead(weight, CPU) if form == "host" else ResidentHead(weight)


def reference(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of ``hidden`` by autograd through an fp64 copy of the whole head. The
    objective's own gradient is taken by autograd, too.
    """
    table = torch.empty(WIDTH, VOCABULARY)
    with head.brought():
        head.projection.project(torch.eye(WIDTH), table)  # (C, V): the table that it computes with
    x = hidden.double().requires_grad_()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * head.norm.double()
    log_probs = (normed @ table.double() * head.logit_scale).log_softmax(-1)
    positions = (targets != IGNORE).nonzero().squeeze(-1)
    chosen = log_probs[positions, targets[positions]]
    if isinstance(head.objective, SequenceSigmoid):
        sums = torch.zeros(len(LENGTHS), dtype=torch.float64)
        document = torch.tensor([d for d, n in enumerate(LENGTHS) for _ in range(n)])[positions]
        loss = -torch.nn.functional.logsigmoid(sums.index_add(0, document, chosen) + 30).sum()
    elif isinstance(head.objective, Focal):
        loss = -((1 - chosen.exp()) ** 2 * chosen).sum()
    else:
        loss = -chosen.sum()
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("form", ["device", "host", "quantized"])
@pytest.mark.parametrize("chunk_bytes", [1, 10**8])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize("objective", [SequenceSigmoid(), Focal(), Supervised(one_pass=False)])
def test_two_passes_equal_autograd_over_full_logits(
    objective: Objective,
    logit_scale: float,
    chunk_bytes: int,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(head_module, "ROW_MULTIPLE", 2)
    generator = torch.Generator().manual_seed(0)
    norm = torch.randn(WIDTH, generator=generator) + 1
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / 4
    hidden = torch.randn(sum(LENGTHS), WIDTH, generator=generator)
    targets = torch.randint(0, VOCABULARY, (sum(LENGTHS),), generator=generator)
    targets[::3] = IGNORE
    head = Head(norm, projection_of(form, weight), EPS, logit_scale, objective=objective)
    trained = (targets != IGNORE).nonzero().squeeze(-1)
    with head.brought():
        loss, grad = head.loss_and_gradient(hidden, targets, trained, LENGTHS)
    expected, expected_grad = reference(head, hidden, targets)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float((grad.double() - expected_grad).norm() / expected_grad.norm()) < 1e-5


def test_supervised_takes_one_pass_or_two_to_the_same_gradient() -> None:
    hidden, weight = torch.randn(41, WIDTH), torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(0, VOCABULARY, (41,))
    once, twice = (
        Head(torch.ones(WIDTH), ResidentHead(weight), EPS, z_loss=1e-3, objective=objective)
        for objective in (SUPERVISED, Supervised(one_pass=False))
    )
    (loss, grad), (loss_again, grad_again) = (
        head.loss_and_gradient(hidden, targets, torch.arange(41), LENGTHS) for head in (once, twice)
    )
    assert float(loss) == pytest.approx(float(loss_again), rel=1e-12)
    torch.testing.assert_close(grad, grad_again, rtol=1e-6, atol=1e-7)


def test_targets_know_their_document() -> None:
    targets = TargetLogProbs(torch.zeros(5), torch.tensor([0, 10, 11, 12, 40]), LENGTHS)
    assert targets.documents().tolist() == [0, 0, 1, 2, 3]


def test_a_metric_is_a_function_in_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is summed over chunks and comes out per target, beside the others."""
    monkeypatch.setitem(
        metrics.METRICS, "likely", lambda log_probs: (log_probs > -4).double().sum()
    )
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    head = Head(torch.ones(WIDTH), ResidentHead(torch.randn(VOCABULARY, WIDTH)), EPS)
    hidden, targets = torch.randn(300, WIDTH), torch.randint(0, VOCABULARY, (300,))
    every = torch.arange(300)
    log_probs = head.log_probs(hidden, targets, every)
    result = EvaluationSums.of(head.metric_sums(hidden, targets, every).tolist(), 300)
    assert result.mean("likely") == pytest.approx(float((log_probs > -4).double().mean()))
    assert result.mean("nll") == pytest.approx(-float(log_probs.double().mean()))
    assert EvaluationSums.of([0.0, 0.0], 0).mean("nll") == 0
