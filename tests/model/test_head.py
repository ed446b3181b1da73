"""Chunked cross entropy over a frozen head against autograd over full logits."""

import pytest
import torch
from torch import Tensor

from fttrain.data.batch import IGNORE
from fttrain.model import head as head_module
from fttrain.model.functions import rms_norm
from fttrain.model.head import Embedding, Head

TOKENS, WIDTH, VOCABULARY, EPS = 41, 24, 97, 1e-6


def head(dtype: torch.dtype = torch.float32, logit_scale: float = 1.0) -> Head:
    generator = torch.Generator().manual_seed(0)
    norm = torch.randn(WIDTH, generator=generator) + 1
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    return Head(norm.to(dtype), weight.to(dtype), EPS, logit_scale)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[::3] = IGNORE
    return hidden.to(dtype), targets


def trained(targets: Tensor) -> Tensor:
    return (targets != IGNORE).nonzero().squeeze(-1)


def reference(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss sum and gradient of ``hidden`` in fp64 by autograd over all logits at once."""
    x = hidden.detach().double().requires_grad_()
    variance = x.square().mean(-1, keepdim=True)
    normed = x * torch.rsqrt(variance + EPS) * head.norm.double()
    logits = normed @ head.weight.double().t() * head.logit_scale
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    squares = logits[targets != IGNORE].logsumexp(-1).square()
    (loss + head.z_loss * squares.sum()).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("chunk_bytes", [1, 3 * VOCABULARY * 8, 10**8])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_equals_full_logits(
    dtype: torch.dtype,
    limit: float,
    logit_scale: float,
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(head_module, "ROW_MULTIPLE", 2)
    ours, (hidden, targets) = head(dtype, logit_scale), batch(dtype)
    before = hidden.clone()
    loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets))
    expected_loss, expected_grad = reference(ours, hidden, targets)
    assert float(loss) == pytest.approx(float(expected_loss), rel=limit)
    assert float((grad.double() - expected_grad).norm() / expected_grad.norm()) < limit
    assert not grad[::3].any()
    assert float(ours.loss(hidden, targets, trained(targets))) == pytest.approx(
        float(loss), rel=1e-6
    )
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_z_loss_equals_full_logits_and_shows_in_the_gradient_alone(
    dtype: torch.dtype, limit: float, logit_scale: float
) -> None:
    ours, (hidden, targets) = head(dtype, logit_scale), batch(dtype)
    without, plain = ours.loss_and_gradient(hidden, targets, trained(targets))
    ours.z_loss = 0.1
    loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets))
    _, expected = reference(ours, hidden, targets)
    assert float((grad.double() - expected).norm() / expected.norm()) < limit
    assert float((grad - plain).norm() / plain.norm()) > 0.1
    assert loss == without


def test_never_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the vocabulary's width has more rows than the chunk that was asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2:
                shape = result.shape
                if shape[1] == VOCABULARY and shape[0] != WIDTH:  # not the weight transposed
                    rows.append(shape[0])
            return result

    chunk_rows = 4
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_rows * VOCABULARY * 8)
    monkeypatch.setattr(head_module, "ROW_MULTIPLE", 2)
    with Watch():
        hidden, targets = batch()
        head().loss_and_gradient(hidden, targets, trained(targets))
    assert rows
    assert max(rows) <= chunk_rows


@pytest.mark.parametrize("tokens", [0, 5])
def test_without_targets_nothing_is_lost_and_nothing_is_nan(tokens: int) -> None:
    hidden, targets = torch.randn(tokens, WIDTH), torch.full((tokens,), IGNORE)
    loss, grad = head().loss_and_gradient(hidden, targets, trained(targets))
    assert float(loss) == 0
    assert grad.shape == hidden.shape
    assert not grad.any()
    assert float(head().loss(hidden, targets, trained(targets))) == 0


def test_a_hopeless_target_has_a_finite_loss_and_a_nan_shows() -> None:
    ours = head()
    hidden, targets = batch()
    sure = Head(ours.norm, ours.weight * 1000, EPS)
    loss, grad = sure.loss_and_gradient(hidden, targets, trained(targets))
    assert bool(loss.isfinite())
    assert bool(grad.isfinite().all())
    hidden[1, 0] = torch.nan
    loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets))
    assert bool(loss.isnan())
    assert bool(grad[1].isnan().any())


def test_logits_and_embedding() -> None:
    ours, (hidden, _) = head(logit_scale=0.5), batch()
    expected = rms_norm(hidden, ours.norm, EPS) @ ours.weight.t() * 0.5
    torch.testing.assert_close(ours.logits(hidden), expected)
    ids = torch.tensor([3, 3, 90])
    assert torch.equal(Embedding(ours.weight)(ids), ours.weight[ids])
    assert torch.equal(Embedding(ours.weight, 2.0)(ids), ours.weight[ids] * 2)
