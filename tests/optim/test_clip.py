"""The clip rule against torch's."""

import pytest
import torch

from fttrain.optim.clip import clip_factor


@pytest.mark.parametrize("scale", [0.01, 1.0, 37.0])
def test_it_scales_as_torch_does(scale: float) -> None:
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0)) * scale
    parameter = torch.nn.Parameter(torch.zeros(50))
    parameter.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_([parameter], 0.5))
    torch.testing.assert_close(gradient * clip_factor(norm, 0.5), parameter.grad)


def test_zero_does_not_clip() -> None:
    assert clip_factor(1e9, 0.0) == 1.0
