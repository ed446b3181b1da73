"""Objectives and metrics: values, and derivatives against autograd."""

import pytest
import tiny_objective
import torch

from fttrain.objective.metrics import METRICS
from fttrain.objective.objective import Objective, TargetTokens
from fttrain.objective.supervised import Supervised

LENGTHS = (3, 1, 5)


def tokens() -> TargetTokens:
    generator = torch.Generator().manual_seed(0)
    return TargetTokens(-torch.rand(sum(LENGTHS), generator=generator), LENGTHS)


@pytest.mark.parametrize(
    "objective", [Supervised(), tiny_objective.Sequences(), tiny_objective.Weighted()], ids=str
)
def test_coefficients_are_the_derivative(objective: Objective) -> None:
    given = tokens()
    values = given.log_probabilities.double().requires_grad_()
    tiny_objective.plain_loss(objective, values, LENGTHS).backward()
    result = objective(given)
    assert result.loss_sum.dtype == torch.float64
    assert result.coefficients.dtype == torch.float32
    expected = tiny_objective.plain_loss(objective, given.log_probabilities.double(), LENGTHS)
    assert float(result.loss_sum) == pytest.approx(float(expected), rel=1e-6)
    assert values.grad is not None
    torch.testing.assert_close(result.coefficients.double(), values.grad, rtol=1e-6, atol=0)


def test_a_constant_coefficient_is_what_the_objective_computes() -> None:
    objective, given = Supervised(), tokens()
    result = objective(given)
    constant = objective.constant_coefficient
    assert constant is not None
    assert set(result.coefficients.tolist()) == {constant}
    total = given.log_probabilities.sum(dtype=torch.float64)
    assert float(result.loss_sum) == constant * float(total)


def test_nll_adds_up_over_chunks() -> None:
    values = tokens().log_probabilities
    whole = METRICS["nll"](values)
    assert whole.dtype == torch.float64
    assert float(whole) == pytest.approx(-float(values.double().sum()), rel=1e-12)
    assert float(sum(map(METRICS["nll"], values.split(4)))) == pytest.approx(float(whole))
