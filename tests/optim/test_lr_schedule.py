"""Learning rates against transformers' schedules, and settings that are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from fttrain.optim.config import OptimConfig
from fttrain.optim.lr_schedule import learning_rate
from fttrain.util.errors import UserError

TOTAL = 50


def theirs(build: Callable[..., Any], warmup_steps: int, **options: Any) -> list[float]:
    """A transformers schedule's rates by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    if build is not get_constant_schedule_with_warmup:
        options["num_training_steps"] = TOTAL
    scheduler = build(optimizer, num_warmup_steps=warmup_steps, **options)
    rates = []
    for _ in range(TOTAL):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(
    ("schedule", "reference", "options"),
    [
        ("constant", get_constant_schedule_with_warmup, {}),
        ("linear", get_linear_schedule_with_warmup, {}),
        ("cosine", get_cosine_schedule_with_warmup, {}),
        ("cosine", get_cosine_with_min_lr_schedule_with_warmup, {"min_lr_rate": 0.1}),
    ],
)
def test_rates_equal_transformers(
    schedule: str, reference: Callable[..., Any], options: dict[str, float], warmup_ratio: float
) -> None:
    config = OptimConfig(
        lr=0.5,
        lr_schedule=schedule,
        warmup_ratio=warmup_ratio,
        min_lr_ratio=options.get("min_lr_rate", 0.0),
    )
    warmup_steps = round(warmup_ratio * TOTAL)
    ours = [learning_rate(config, step, TOTAL) for step in range(TOTAL)]
    assert ours[warmup_steps:] == pytest.approx(
        theirs(reference, warmup_steps, **options)[warmup_steps:]
    )
    # transformers' first step has a rate of 0; ours moves at once and reaches lr a step later
    rise = [0.5 * (step + 1) / (warmup_steps + 1) for step in range(warmup_steps)]
    assert ours[:warmup_steps] == pytest.approx(rise)


def test_linear_falls_to_its_floor_after_the_last_step() -> None:
    config = OptimConfig(lr=2.0, lr_schedule="linear", warmup_ratio=0, min_lr_ratio=0.25)
    assert learning_rate(config, 0, 10) == 2.0
    assert learning_rate(config, 5, 10) == pytest.approx(2 * (0.25 + 0.75 * 0.5))
    assert learning_rate(config, 10, 10) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_positive_rates(schedule: str, total: int) -> None:
    config = OptimConfig(lr=1.0, lr_schedule=schedule, warmup_ratio=0.5)
    assert all(0 < learning_rate(config, step, total) <= 1 for step in range(total))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "sgd"},
        {"kind": "paged_adamw8bit", "offload": True},
        {"kind": "deepspeed_cpu_adam"},
        {"loraplus_lr_ratio": 0.0},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
        {"eps": -1e-8},
        {"weight_decay": float("inf")},
        {"max_grad_norm": -1.0},
        {"lr_schedule": "step"},
        {"warmup_ratio": 1.0},
        {"min_lr_ratio": 1.5},
    ],
    ids=str,
)
def test_wrong_settings_name_their_key(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"optim.{next(iter(settings))}="):
        OptimConfig(**settings)
