"""Optimizers against torch's and bitsandbytes' own over plain parameters."""

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from fttrain.errors import UserError
from fttrain.optim import config as optim_config
from fttrain.optim.config import OptimConfig
from fttrain.optim.optimizer import Optimizer, moment_bytes

ON_THE_HOST = "deepspeed_cpu_adam"
KINDS = [
    pytest.param(kind, marks=pytest.mark.deepspeed if kind == ON_THE_HOST else ())
    for kind in optim_config.KINDS
]
SIZES = ((9000, 5000), (600, 40))  # values of each layer, and of its A's; 8 bits from 4096 on
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
RATIO = 4.0
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def config(kind: str, **settings: Any) -> OptimConfig:
    return OptimConfig(kind=kind, eps=1e-7, offload=kind == ON_THE_HOST, **SETTINGS, **settings)


def flats(device: str = "cpu") -> list[tuple[nn.Parameter, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(nn.Parameter(torch.randn(n, generator=generator).to(device)), a) for n, a in SIZES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, generator=generator) for n, _ in SIZES]


def apply(optimizer: Optimizer, layers: list[tuple[nn.Parameter, int]], steps: range) -> None:
    for step in steps:
        for (flat, _), grad in zip(layers, gradients(step), strict=True):
            flat.grad = grad.to(flat.device)
        for place in range(len(layers)):
            optimizer.step(place, 1e-2 / (step + 1))


def reference(kind: str, groups: Any) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "adamw": lambda: torch.optim.AdamW(groups, eps=1e-7, foreach=False, **SETTINGS),
        "adamw8bit": lambda: bitsandbytes.optim.AdamW8bit(groups, eps=1e-7, **SETTINGS),
        "paged_adamw8bit": lambda: bitsandbytes.optim.PagedAdamW8bit(groups, eps=1e-7, **SETTINGS),
        "lion8bit": lambda: bitsandbytes.optim.Lion8bit(groups, **SETTINGS),
        ON_THE_HOST: lambda: torch.optim.AdamW(groups, eps=1e-7, foreach=False, **SETTINGS),
    }
    return made[kind]()


@pytest.mark.parametrize("ratio", [1.0, RATIO])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_plain_optimizer(kind: str, ratio: float) -> None:
    layers = flats()
    apply(Optimizer(layers, config(kind, loraplus_lr_ratio=ratio)), layers, range(6))
    a, b = (
        [nn.Parameter(part.clone()) for part in halves]
        for halves in zip(
            *(flat.data.split([n, len(flat) - n]) for flat, n in flats()), strict=True
        )
    )
    plain = reference(kind, [{"params": a}, {"params": b}])
    for step in range(6):
        for one, other, grad in zip(a, b, gradients(step), strict=True):
            one.grad, other.grad = grad.split([len(one), len(other)])
        for group, factor in zip(plain.param_groups, (1.0, ratio), strict=True):
            group["lr"] = factor * 1e-2 / (step + 1)
        plain.step()
    for (flat, _), one, other in zip(layers, a, b, strict=True):
        torch.testing.assert_close(
            flat.detach(), torch.cat([one, other]).detach(), rtol=1e-6, atol=1e-7
        )


PLACES = [pytest.param(*kind.values, "cpu", marks=kind.marks) for kind in KINDS] + [
    pytest.param(kind, "cuda", marks=pytest.mark.cuda)
    for kind in optim_config.KINDS
    if kind != ON_THE_HOST
]


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: str, device: str) -> None:
    layers = flats(device)
    optimizer = Optimizer(layers, config(kind), first_layer=3)
    assert optimizer.state() == {}
    apply(optimizer, layers, range(3))
    state = {name: value.cpu().clone() for name, value in optimizer.state().items()}
    assert {name.split(".", 2)[0] for name in state} == {"3", "4"}
    resumed = [(nn.Parameter(flat.detach().clone()), a) for flat, a in layers]
    other = Optimizer(resumed, config(kind), first_layer=3)
    other.restore(state)
    apply(optimizer, layers, range(3, 6))
    apply(other, resumed, range(3, 6))
    for (mine, _), (expected, _) in zip(resumed, layers, strict=True):
        assert torch.equal(mine, expected)
    assert all(torch.equal(value, other.state()[n]) for n, value in optimizer.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_moments_take_what_is_booked(kind: str) -> None:
    values = 256 * 40
    layer = nn.Parameter(torch.zeros(values))
    layer.grad = torch.ones(values)
    optimizer = Optimizer([(layer, values // 2)], config(kind))
    optimizer.step(0, 1e-2)
    kept = sum(value.nbytes for name, value in optimizer.state().items() if "step" not in name)
    assert kept == moment_bytes(config(kind), values)


def test_state_of_other_parameters_is_refused() -> None:
    theirs = flats()
    optimizer = Optimizer(theirs, config("adamw"))
    apply(optimizer, theirs, range(1))
    state = optimizer.state()
    fewer = [(nn.Parameter(torch.zeros(30)), 10), (nn.Parameter(torch.zeros(600)), 40)]
    with pytest.raises(
        UserError, match=r"0\.a has 5000 values of exp_avg.* 10;.*other lora settings"
    ):
        Optimizer(fewer, config("adamw")).restore(state)
    with pytest.raises(
        UserError, match=r"state of 0\.a has exp_avg, exp_avg_sq, step, wanted are .*state1"
    ):
        Optimizer(flats(), config("adamw8bit")).restore(state)
    with pytest.raises(UserError, match=r"no optimizer state of 7\.a; it belongs to another model"):
        Optimizer(flats(), config("adamw"), first_layer=7).restore(state)
