"""The head of strategy=deepspeed, whose weight may train, against autograd over full logits."""

import pytest
import tiny_objective
import torch
from torch import Tensor, nn

from fttrain.model import head as head_module
from fttrain.objective.objective import Objective
from fttrain.objective.supervised import Supervised
from fttrain.strategy.deepspeed.head import LossHead

WIDTH, VOCABULARY, Z_LOSS, LOGIT_SCALE = 16, 53, 0.1, 0.5
COUNTS = (5, 0, 12, 10)  # targets of each sequence; one has none
OBJECTIVES = [Supervised(), tiny_objective.Sequences(), tiny_objective.Weighted()]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Weight (V, C), hidden (M, C) and targets (M,)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    hidden = torch.randn(sum(COUNTS), WIDTH, generator=generator)
    return weight, hidden, torch.randint(0, VOCABULARY, (sum(COUNTS),), generator=generator)


def plain(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, and the gradients of hidden and weight of what is minimised, in fp64."""
    weight, hidden, targets = inputs()
    table, x = (tensor.double().requires_grad_() for tensor in (weight, hidden))
    logits = x @ table.t() * LOGIT_SCALE
    values = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = tiny_objective.plain_loss(objective, values, [count for count in COUNTS if count])
    (3 * (loss + Z_LOSS * logits.logsumexp(-1).square().sum())).backward()
    assert x.grad is not None
    assert table.grad is not None
    return loss.detach(), x.grad, table.grad


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 10**8], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("trains", [True, False])
def test_equals_autograd_over_full_logits(
    trains: bool, chunk_bytes: int, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(head_module, "ROW_MULTIPLE", 2)
    weight, hidden, targets = inputs()
    head = LossHead(nn.Parameter(weight, requires_grad=trains), LOGIT_SCALE, Z_LOSS, objective)
    x = hidden.requires_grad_()
    loss = head(x, targets, COUNTS)
    (3 * loss).backward()
    expected, grad_hidden, grad_weight = plain(objective)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), grad_hidden, rtol=1e-4, atol=1e-4)
    if trains:
        assert head.weight.grad is not None
        torch.testing.assert_close(head.weight.grad.double(), grad_weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_evaluation_gives_the_metrics_whatever_the_objective(objective: Objective) -> None:
    weight, hidden, targets = inputs()
    head = LossHead(nn.Parameter(weight), LOGIT_SCALE, Z_LOSS, objective).eval()
    with torch.no_grad():
        (nll,) = head(hidden, targets, COUNTS)
    assert float(nll) == pytest.approx(float(plain(Supervised())[0]), rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_without_targets_the_loss_is_zero_and_has_gradients(objective: Objective) -> None:
    weight, hidden, targets = inputs()
    head, x = LossHead(nn.Parameter(weight), 1.0, 0.0, objective), hidden[:0].requires_grad_()
    loss = head(x, targets[:0], ())
    loss.backward()
    assert float(loss.detach()) == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
