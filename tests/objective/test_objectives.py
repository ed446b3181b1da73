"""Objectives and metrics: values, and derivatives against autograd."""

from dataclasses import replace
from typing import Any

import pytest
import tiny_objective
import tiny_strategy
import torch

from fttrain.objective.metrics import METRICS
from fttrain.objective.objective import Objective, TargetTokens
from fttrain.objective.supervised import Supervised
from fttrain.training import evaluation
from fttrain.training.evaluation import HoldOut

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


def test_a_metric_is_one_function_in_one_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mean over all targets comes out beside nll's."""
    strategy = tiny_strategy.build(tiny_strategy.SPEC, tiny_strategy.base())
    batches = tiny_strategy.micro_batches(strategy)
    alone = strategy.evaluate(batches)
    monkeypatch.setitem(METRICS, "squares", lambda values: values.double().square().sum())
    sums = strategy.evaluate(batches)
    assert sums.targets == alone.targets == sum(batch.valid_tokens for batch in batches)
    assert list(sums.metrics) == ["nll", "squares"]
    assert sums.metrics["nll"] == alone.metrics["nll"]
    assert sums.mean("squares") > sums.mean("nll") ** 2
    rows: Any = None
    monkeypatch.setattr(evaluation, "evaluation_batches", lambda *_: batches)
    figures = HoldOut(rows, 1, halve=False).loss(strategy, print)
    assert figures == {
        "nll": sums.mean("nll"),
        "squares": sums.mean("squares"),
        "tokens": sums.targets,
    }


@pytest.mark.parametrize("spread", ["pipeline", "replicate"])
def test_the_objective_reaches_the_head_of_a_strategy(spread: str) -> None:
    """Two passes over the head train what one pass does, to the bit."""
    spec = tiny_strategy.variant(spread)
    steps = []
    for objective in (Supervised(), tiny_objective.TwoPasses(), tiny_objective.Weighted()):
        changed = replace(spec, objective=objective)
        strategy = tiny_strategy.build(changed, tiny_strategy.base())
        stats, gradients = tiny_strategy.measure(strategy, 0)
        steps.append((stats.loss, stats.grad_norm, gradients))
    one, two, weighted = steps
    assert two[0] == pytest.approx(one[0], rel=1e-12)
    assert two[1] == one[1]
    assert all(torch.equal(two[2][name], gradient) for name, gradient in one[2].items())
    assert weighted[0] < 0.9 * one[0]
