"""DeepSpeed's kernel against torch's AdamW; where it is missing or cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fttrain.optim.config import OptimConfig
from fttrain.optim.cpu_adam import CpuAdam, build_folder
from fttrain.optim.flat import Section
from fttrain.optim.optimizer import Optimizer
from fttrain.util.errors import UserError

SIZES = ((9001, 5003), (600, 40))  # values of each layer, and of its A's; no multiple of a register
STEPS = 20
KIND = "deepspeed_cpu_adam"


def settings(kind: str) -> OptimConfig:
    return OptimConfig(
        kind=kind, lr=1e-3, weight_decay=0.1, loraplus_lr_ratio=16.0, offload=kind == KIND
    )


Part = tuple[nn.Parameter, list[Section]]


def flats() -> list[Part]:
    """Sections without padding: the kernel has to do with any length."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            nn.Parameter(torch.randn(n, generator=generator)),
            [Section("a", slice(0, a), 0, a), Section("b", slice(a, n), 0, n - a)],
        )
        for n, a in SIZES
    ]


def apply(optimizer: Optimizer, layers: list[Part], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for place, (flat, _) in enumerate(layers):
            flat.grad = torch.randn(len(flat), generator=generator) * 10.0 ** (place - 3)
            optimizer.step(place, 1e-3 / (step + 1))


def difference(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.deepspeed
def test_twenty_steps_equal_torch() -> None:
    """Weight decay and a rate of its own for either half; betas and eps as they usually are."""
    ours, theirs = flats(), flats()
    made, reference = Optimizer(ours, settings(KIND)), Optimizer(theirs, settings("adamw"))
    apply(made, ours, range(STEPS))
    apply(reference, theirs, range(STEPS))
    start = [flat for flat, _ in flats()]
    for (found, _), (expected, _), before in zip(ours, theirs, start, strict=True):
        assert difference(found, expected) <= 1e-6
        assert difference(found - before, expected - before) <= 1e-4
    state, wanted = made.state(), reference.state()
    assert state.keys() == wanted.keys()
    # The kernel takes 1 - 0.999 in fp32, which is 1.3e-5 off: so is the second moment.
    assert all(difference(state[name].float(), wanted[name]) <= 2e-5 for name in wanted)


@pytest.mark.deepspeed
@pytest.mark.parametrize(("before", "after"), [("adamw", KIND), (KIND, "adamw")])
def test_it_goes_on_where_torch_stopped_and_the_other_way(before: str, after: str) -> None:
    ours, theirs = flats(), flats()
    first, whole = Optimizer(ours, settings(before)), Optimizer(theirs, settings("adamw"))
    apply(first, ours, range(5))
    second = Optimizer(ours, settings(after))
    second.restore({name: value.clone() for name, value in first.state().items()})
    apply(second, ours, range(5, STEPS))
    apply(whole, theirs, range(STEPS))
    for (found, _), (expected, _) in zip(ours, theirs, strict=True):
        assert difference(found, expected) <= 1e-6


@pytest.mark.deepspeed
def test_an_update_depends_on_the_step_and_on_no_other_instance() -> None:
    """Two in turns and the same two one after the other."""

    def trained(in_turns: bool) -> list[Tensor]:
        values = [nn.Parameter(torch.linspace(-1, 1, 100)) for _ in range(2)]
        made = [CpuAdam([{"params": [p]}], 1e-2, (0.9, 0.999), 1e-8, 0.0) for p in values]
        order = [0, 1] * 3 if in_turns else [0] * 3 + [1] * 3
        for place in order:
            values[place].grad = torch.full((100,), 0.5 + place)
            made[place].step()
        return [p.detach() for p in values]

    for one, other in zip(trained(True), trained(False), strict=True):
        assert torch.equal(one, other)


def test_where_deepspeed_is_missing_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # to Python: there is no such module
    message = r"DeepSpeed is not installed.*pip install --no-build-isolation 'fttrain\[deepspeed\]'"
    with pytest.raises(UserError, match=message):
        OptimConfig(kind=KIND, offload=True)


CHOSEN = """
import sys, torch
from fttrain.util.errors import UserError
from fttrain.optim.config import OptimConfig
from fttrain.optim.cpu_adam import CpuAdam
OptimConfig(kind="deepspeed_cpu_adam", offload=True)
assert "deepspeed" not in sys.modules, "nobody has asked for it yet"
try:
    CpuAdam([{"params": [torch.nn.Parameter(torch.ones(6))]}], 1e-3, (0.9, 0.999), 1e-8, 0.0)
except UserError as error:
    print(error)
"""


def said(**environment: str) -> list[str]:
    """All that a process says, on both streams, that builds the optimizer."""
    done = subprocess.run(
        [sys.executable, "-c", CHOSEN],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout.splitlines()


@pytest.mark.deepspeed
def test_it_is_imported_when_it_is_used_and_says_one_line() -> None:
    assert said() == ["DeepSpeed's kernel: its first use on a machine compiles it"]


@pytest.mark.deepspeed
def test_a_kernel_that_cannot_be_compiled_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for ever either, where another compiler was killed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = build_folder() / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    first, *others = said(CXX="/bin/false")
    assert first == "DeepSpeed's kernel: its first use on a machine compiles it"
    assert "optim.kind=deepspeed_cpu_adam: DeepSpeed's kernel could not be made" in others[-1]
    assert "it needs a C++ compiler and ninja" in others[-1]
