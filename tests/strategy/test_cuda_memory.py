"""Memory that really runs out on a card: the step is void, and nothing of it is left."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch, collate
from fttrain.distributed.rank_group import RankGroup
from fttrain.strategy.protocol import OutOfMemory
from fttrain.strategy.spec import StepSize
from fttrain.util.units import MIB

pytestmark = pytest.mark.cuda
# Short documents: of longer ones flash attention's backward adds in any order. All together they
# make tensors that torch's allocator does not keep among the small ones.
LENGTHS = (64,) * 62
MICRO_BATCHES = 3
SEGMENT_BYTES, BLOCK_BYTES = (
    20 * MIB,
    5 * MIB // 4,
)  # asked of the driver for tensors of 1 to 10 MiB
ON_HOST = {"embedding": "host", "lm_head": "host", "layer_inputs": "host", "offload": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "replicate": {},
    "kept": {"activations": "keep", "group": 1},
    "stream": {"strategy": "stream", **ON_HOST},
    "offloaded": {"strategy": "stream", "activations": "offload"},
}


def build(settings: dict[str, Any]) -> Any:
    card = RankGroup(0, 1, 0, torch.device("cuda", torch.cuda.current_device()))
    spec = tiny_strategy.variant(dtype="bfloat16", **settings)
    spec = replace(spec, size=StepSize(1, sum(LENGTHS), MICRO_BATCHES))
    return tiny_strategy.build(spec, tiny_strategy.base(dtype="bfloat16"), card)


def batches(step: int) -> list[MicroBatch]:
    seeds = range(MICRO_BATCHES * step, MICRO_BATCHES * (step + 1))
    return [collate(tiny.documents(LENGTHS, seed), i) for i, seed in enumerate(seeds)]


def take(strategy: Any, step: int, update: bool = True) -> float:
    stats = strategy.train_step(batches(step), step, 1e-2, lambda loss, norm: update)
    return float(stats.loss)


@contextlib.contextmanager
def room(segments: int) -> Iterator[None]:
    """Of what the allocator would ask the driver for, ``segments`` are left, and what it has and
    gave nobody is taken.
    """
    held: list[Tensor] = []
    small = [torch.empty(MIB // 4, dtype=torch.uint8, device="cuda") for _ in range(32)]
    torch.cuda.synchronize()
    limit_bytes = torch.cuda.memory_reserved() + segments * SEGMENT_BYTES
    _, total_bytes = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((limit_bytes + MIB / 2) / total_bytes)
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda"))
        del small, held[len(held) - segments * (SEGMENT_BYTES // BLOCK_BYTES) :]
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("segments", [0, 1, 2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_runs_out_leaves_nothing_behind(name: str, segments: int) -> None:
    undisturbed, strategy = build(VARIANTS[name]), build(VARIANTS[name])
    expected = [take(undisturbed, step) for step in range(3)]
    losses = [take(strategy, 0)]
    # With some room it depends on the card how far a step comes, and whether to its end.
    expectation = contextlib.suppress(OutOfMemory) if segments else pytest.raises(OutOfMemory)
    with room(segments), expectation:
        take(strategy, 1, update=False)
    losses += [take(strategy, step) for step in (1, 2)]
    assert losses == pytest.approx(expected, rel=1e-3)
    ours, theirs = (
        {name: value.cpu() for name, value in tiny_strategy.adapters(one).items()}
        for one in (strategy, undisturbed)
    )
    assert tiny.difference(ours, theirs) < 1e-2
