"""The clip rule against torch's."""

import pytest
import torch
from torch import nn

from fttrain.optim.clip import clip_factor


@pytest.mark.parametrize("max_norm", [0.05, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1.0, 1e4])
def test_equals_torch(scale: float, max_norm: float) -> None:
    parameter = nn.Parameter(torch.zeros(17, dtype=torch.float64))
    gradient = scale * torch.arange(17, dtype=torch.float64)
    parameter.grad = gradient.clone()
    norm = float(nn.utils.clip_grad_norm_([parameter], max_norm))
    torch.testing.assert_close(gradient * clip_factor(norm, max_norm), parameter.grad)


def test_zero_is_no_clipping() -> None:
    assert clip_factor(1e9, 0) == 1.0
