"""Norm, SwiGLU and rotation against transformers' modules and torch's autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fttrain.model import rows
from fttrain.model.functions import (
    rms_norm,
    rms_norm_backward,
    rotate_,
    swiglu,
    swiglu_backward,
)

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


def autograd(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    function(x).backward(grad)
    assert x.grad is not None
    return x.grad


def norm_of(width: int, dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, EPS).to(dtype)
    norm.weight.data.copy_(random(width, seed=5))
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 48), (5, 3, 16), (0, 48)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = norm_of(shape[-1], dtype)
    x, grad = random(*shape, dtype=dtype) * 3, random(*shape, seed=1, dtype=dtype)
    before = x.clone()
    close(rms_norm(x, norm.weight, EPS), norm(x))
    close(rms_norm_backward(grad, x, norm.weight, EPS), autograd(norm, x, grad))
    assert torch.equal(x, before)


def test_rms_norm_of_zeros_and_of_huge_values_is_finite() -> None:
    weight, grad = torch.ones(8), random(2, 8)
    for x in (torch.zeros(2, 8), torch.full((2, 8), 1e15), torch.full((2, 8), 1e-30)):
        assert bool(rms_norm(x, weight, EPS).isfinite().all())
        assert bool(rms_norm_backward(grad, x, weight, EPS).isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    gate_up, grad = random(9, 32, dtype=dtype) * 4, random(9, 16, seed=1, dtype=dtype)
    before = gate_up.clone()

    def reference(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x[:, :16]) * x[:, 16:]

    close(swiglu(gate_up), reference(gate_up))
    close(swiglu_backward(grad, gate_up), autograd(reference, gate_up, grad))
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_its_inverse(dtype: torch.dtype) -> None:
    heads, angles = random(11, 3, 16, dtype=dtype), random(11, 8, seed=2) * 50
    cos, sin = (f(angles).repeat(1, 2).to(dtype) for f in (torch.cos, torch.sin))

    def reference(x: Tensor) -> Tensor:
        x = x.transpose(0, 1)[None]  # transformers' (B, H, T, D)
        return apply_rotary_pos_emb(x, x, cos[None], sin[None])[0][0].transpose(0, 1)

    rotated = rotate_(heads.clone(), cos, sin)
    close(rotated, reference(heads))
    close(rotate_(rotated.clone(), cos, -sin), heads)
    grad = random(11, 3, 16, seed=4, dtype=dtype)
    close(rotate_(grad.clone(), cos, -sin), autograd(reference, heads, grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Tiles of one token, of 2 and of 7: neither divides 11 tokens."""
    x, grad, weight = (random(11, 3, 16, seed=s, dtype=dtype) for s in (0, 1, 2))
    weight = weight[0, 0]
    wide, narrow = x.reshape(11, 48), grad.reshape(11, 48)[:, :24]
    cos, sin = (random(11, 16, seed=s, dtype=dtype) for s in (3, 4))

    def results() -> list[Tensor]:
        return [
            rms_norm(x, weight, EPS),
            rms_norm_backward(grad, x, weight, EPS),
            swiglu_backward(narrow, wide),
            rotate_(x.clone(), cos, sin),
        ]

    whole = results()
    for values in (1, 2 * 48, 7 * 48):
        monkeypatch.setattr(rows, "TILE_VALUES", values)
        assert all(torch.equal(tiled, one) for tiled, one in zip(results(), whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_may_be_overwritten_by_the_one_before_the_norm(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x, grad, weight = (random(9, 48, seed=s, dtype=dtype) for s in (0, 1, 2))
    expected = rms_norm_backward(grad, x, weight[0], EPS)
    monkeypatch.setattr(rows, "TILE_VALUES", 2 * 48)
    assert rms_norm_backward(grad, x, weight[0], EPS, out=grad) is grad
    assert torch.equal(grad, expected)
