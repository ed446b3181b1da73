"""Optimizers against torch's and bitsandbytes' own over plain parameters."""

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from fttrain.optim import config as optim_config
from fttrain.optim.config import OptimConfig
from fttrain.optim.flat import FlatLayout, Section, Shard
from fttrain.optim.optimizer import Optimizer, moment_bytes
from fttrain.util.errors import UserError

ON_THE_HOST = "deepspeed_cpu_adam"
KINDS = [
    pytest.param(kind, marks=pytest.mark.deepspeed if kind == ON_THE_HOST else ())
    for kind in optim_config.KINDS
]
# Values of each layer's A's and B's
SIZES = ((5000, 4000), (40, 560))
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
EIGHT = {**SETTINGS, "min_8bit_size": 1}
RATIO = 4.0
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def config(kind: str, **settings: Any) -> OptimConfig:
    return OptimConfig(kind=kind, eps=1e-7, offload=kind == ON_THE_HOST, **SETTINGS, **settings)


Part = tuple[nn.Parameter, list[Section]]


def layout(sizes: tuple[int, int], shard: Shard | None = None) -> FlatLayout:
    return FlatLayout({"a": (sizes[0],), "b": (sizes[1],)}, shard)


def spread(values: list[Tensor], made: FlatLayout) -> Tensor:
    """A's and B's in a flat tensor."""
    whole = torch.zeros(made.values)
    for name, own in zip("ab", values, strict=True):
        made.tensors(whole, name)[0].copy_(own)
    return whole


def random(seed: int) -> list[list[Tensor]]:
    """Of each layer A's and B's."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, generator=generator) for n in sizes] for sizes in SIZES]


def parts(device: str = "cpu", shard: Shard | None = None) -> list[Part]:
    """What a rank has of each layer."""
    made = []
    for values, sizes in zip(random(0), SIZES, strict=True):
        plan = layout(sizes, shard)
        own = plan.shard.view(spread(values, plan)).clone()
        made.append((nn.Parameter(own.to(device)), plan.local_sections()))
    return made


def apply(
    optimizer: Optimizer, layers: list[Part], steps: range, shard: Shard | None = None
) -> None:
    for step in steps:
        for place, ((flat, _), values) in enumerate(zip(layers, random(100 + step), strict=True)):
            plan = layout(SIZES[place], shard)
            flat.grad = plan.shard.view(spread(values, plan)).to(flat.device)
            optimizer.step(place, 1e-2 / (step + 1))


def reference(kind: str, groups: Any) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "adamw": lambda: torch.optim.AdamW(groups, eps=1e-7, foreach=False, **SETTINGS),
        "adamw8bit": lambda: bitsandbytes.optim.AdamW8bit(groups, eps=1e-7, **EIGHT),
        "paged_adamw8bit": lambda: bitsandbytes.optim.PagedAdamW8bit(groups, eps=1e-7, **EIGHT),
        "lion8bit": lambda: bitsandbytes.optim.Lion8bit(groups, **EIGHT),
        ON_THE_HOST: lambda: torch.optim.AdamW(groups, eps=1e-7, foreach=False, **SETTINGS),
    }
    return made[kind]()


@pytest.mark.parametrize("ratio", [1.0, RATIO])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_plain_optimizer(kind: str, ratio: float) -> None:
    layers = parts()
    apply(Optimizer(layers, config(kind, loraplus_lr_ratio=ratio)), layers, range(6))
    a, b = ([nn.Parameter(own) for own in half] for half in zip(*random(0), strict=True))
    plain = reference(kind, [{"params": a}, {"params": b}])
    for step in range(6):
        for one, other, grads in zip(a, b, random(100 + step), strict=True):
            one.grad, other.grad = grads
        for group, factor in zip(plain.param_groups, (1.0, ratio), strict=True):
            group["lr"] = factor * 1e-2 / (step + 1)
        plain.step()
    for (flat, _), sizes, *halves in zip(layers, SIZES, a, b, strict=True):
        for name, expected in zip("ab", halves, strict=True):
            (found,) = layout(sizes).tensors(flat.detach(), name)  # nothing reads the padding
            torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_updated_as_the_whole(kind: str, world_size: int) -> None:
    """Bit for bit; moments end to end are those of the whole, and each part takes its own back."""
    whole = parts()
    one = Optimizer(whole, config(kind, loraplus_lr_ratio=RATIO), first_layer=3)
    apply(one, whole, range(3))
    found: dict[str, list[Tensor]] = {}
    ranks = [Shard(rank, world_size) for rank in range(world_size)]
    for shard in ranks:
        own = parts(shard=shard)
        optimizer = Optimizer(own, config(kind, loraplus_lr_ratio=RATIO), first_layer=3)
        apply(optimizer, own, range(3), shard)
        for name, value in optimizer.state().items():
            found.setdefault(name, []).append(value)
    state = one.state()
    assert found.keys() == state.keys()
    for name, pieces in found.items():
        assert torch.equal(torch.cat(pieces) if pieces[0].dim() else pieces[0], state[name])
    apply(one, whole, range(3, 5))
    for shard in ranks:
        own = parts(shard=shard)
        other = Optimizer(own, config(kind, loraplus_lr_ratio=RATIO), first_layer=3)
        apply(other, own, range(3), shard)
        again = Optimizer(own, config(kind, loraplus_lr_ratio=RATIO), first_layer=3)
        again.restore({name: value.clone() for name, value in state_after(kind, 3).items()})
        apply(again, own, range(3, 5), shard)
        for (mine, _), (flat, _), sizes in zip(own, whole, SIZES, strict=True):
            longer = torch.nn.functional.pad(flat.detach(), (0, layout(sizes, shard).values))
            expected = shard.view(longer[: layout(sizes, shard).values])
            assert torch.equal(mine.detach(), expected)


def state_after(kind: str, steps: int) -> dict[str, Tensor]:
    """Of all, after so many steps."""
    layers = parts()
    optimizer = Optimizer(layers, config(kind, loraplus_lr_ratio=RATIO), first_layer=3)
    apply(optimizer, layers, range(steps))
    return optimizer.state()


PLACES = [pytest.param(*kind.values, "cpu", marks=kind.marks) for kind in KINDS] + [
    pytest.param(kind, "cuda", marks=pytest.mark.cuda)
    for kind in optim_config.KINDS
    if kind != ON_THE_HOST
]


@pytest.mark.parametrize(("kind", "device"), PLACES)
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: str, device: str) -> None:
    layers = parts(device)
    optimizer = Optimizer(layers, config(kind), first_layer=3)
    assert optimizer.state() == {}
    apply(optimizer, layers, range(3))
    state = {name: value.cpu().clone() for name, value in optimizer.state().items()}
    assert {name.split(".", 2)[0] for name in state} == {"3", "4"}
    resumed = [(nn.Parameter(flat.detach().clone()), sections) for flat, sections in layers]
    other = Optimizer(resumed, config(kind), first_layer=3)
    other.restore(state)
    apply(optimizer, layers, range(3, 6))
    apply(other, resumed, range(3, 6))
    for (mine, _), (expected, _) in zip(resumed, layers, strict=True):
        assert torch.equal(mine, expected)
    assert all(torch.equal(value, other.state()[n]) for n, value in optimizer.state().items())


@pytest.mark.cuda
def test_moments_that_are_paged_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1e5 values on; smaller ones bitsandbytes leaves on the card."""
    monkeypatch.setitem(globals(), "SIZES", ((130_000, 4000), (40, 560)))
    layers = parts("cuda")
    optimizer = Optimizer(layers, config("paged_adamw8bit"))
    apply(optimizer, layers, range(1))
    assert getattr(optimizer.state()["0.a.state1"], "is_paged", False)
    test_a_restored_optimizer_goes_on_bit_for_bit("paged_adamw8bit", "cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_moments_take_what_is_booked(kind: str) -> None:
    values = 256 * 40
    layer = nn.Parameter(torch.zeros(values))
    layer.grad = torch.ones(values)
    sections = layout((values // 2, values // 2)).local_sections()
    optimizer = Optimizer([(layer, sections)], config(kind))
    optimizer.step(0, 1e-2)
    kept = sum(value.nbytes for name, value in optimizer.state().items() if "step" not in name)
    assert kept == moment_bytes(config(kind), values)


def test_state_of_other_parameters_is_refused() -> None:
    theirs = parts()
    optimizer = Optimizer(theirs, config("adamw"))
    apply(optimizer, theirs, range(1))
    state = optimizer.state()
    plan = layout((10, 20))
    fewer = [(nn.Parameter(torch.zeros(plan.values)), plan.local_sections()) for _ in SIZES]
    with pytest.raises(
        UserError, match=r"0\.a has 5120 values of exp_avg.* 256;.*other lora settings"
    ):
        Optimizer(fewer, config("adamw")).restore(state)
    with pytest.raises(
        UserError, match=r"state of 0\.a has exp_avg, exp_avg_sq, step, wanted are .*state1"
    ):
        Optimizer(parts(), config("adamw8bit")).restore(state)
    with pytest.raises(UserError, match=r"no optimizer state of 7\.a; it belongs to another model"):
        Optimizer(parts(), config("adamw"), first_layer=7).restore(state)
