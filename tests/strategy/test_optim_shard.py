"""Masters and moments in parts train what whole ones do: bit for bit where nothing is clipped.

The norm of a gradient is summed in another order where each rank has the norm of its part; that is
all that differs.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import tiny_strategy
from ranks import run_ranks

from fttrain.strategy.spec import StrategySpec

STEPS = 2
HOST = {"offload": True, "layer_inputs": "host", "embedding": "host", "lm_head": "host"}


@dataclass(frozen=True)
class Case:
    strategy: str = "replicate"
    group: int | str = "all"
    offload: bool = False
    kind: str = "adamw"
    clip: float = 0.0

    def spec(self, shard: bool) -> StrategySpec:
        host = HOST if self.offload else {}
        spec = tiny_strategy.variant(self.strategy, self.group, **host)
        optim = replace(
            spec.optim,
            kind=self.kind,
            shard=shard,
            max_grad_norm=self.clip,
            loraplus_lr_ratio=4.0,
        )
        return replace(spec, optim=optim)


CASES = [
    Case(),
    Case(group=1),
    Case(offload=True, kind="adamw8bit"),
    Case("shard", group=2, offload=True),
    Case("stream", kind="lion8bit"),
    Case("shard", clip=0.05),
    Case("stream", group=1, offload=True, clip=0.05),
]
# How values are cut depends on the rank count, and not on what else a case sets.
CASES_ON = {2: CASES, 4: [Case(), Case(offload=True, kind="adamw8bit"), Case("shard", clip=0.05)]}
RUNS = [(world_size, case) for world_size, cases in CASES_ON.items() for case in cases]


def states(strategy: Any) -> dict[str, dict[str, Any]]:
    return {
        "adapter": tiny_strategy.copied(strategy.adapter_state()),
        "optimizer": tiny_strategy.copied(strategy.optimizer_state()),
    }


def train(case: Case, shard: bool, start: dict[str, dict[str, Any]] | None = None) -> Any:
    """A few steps from the beginning, or from a state."""
    strategy = tiny_strategy.build(case.spec(shard), tiny_strategy.base())
    if start is not None:
        strategy.load_adapter_state(tiny_strategy.copied(start["adapter"]))
        strategy.load_optimizer_state(tiny_strategy.copied(start["optimizer"]))
    steps = [tiny_strategy.apply(strategy, step) for step in range(STEPS)]
    reserved = {r.part.name: r.size_bytes for r in strategy.reservations}
    return {
        **states(strategy),
        "figures": [(stats.loss, stats.grad_norm, stats.updated) for stats in steps],
        "evaluated": tiny_strategy.evaluated(strategy),
        "answers": strategy.generate([[3, 4, 5]], 4, set()),
        "values": [layer.adapters.flat.numel() for layer in strategy.decoder.layers],
        "gathered": [stats.update.optim_gather_bytes for stats in steps],
        "sync_bytes": [stats.sync.sync_bytes for stats in steps],
        "reserved": reserved,
    }


def on_rank(cases: list[Case]) -> dict[Case, Any]:
    return {case: (train(case, False), train(case, True)) for case in cases}


@functools.cache
def found_on(world_size: int) -> list[dict[Case, Any]]:
    return run_ranks(on_rank, world_size, CASES_ON[world_size])


@pytest.mark.parametrize(("world_size", "case"), RUNS, ids=str)
def test_parts_train_what_the_whole_does(world_size: int, case: Case) -> None:
    for rank, found in enumerate(found_on(world_size)):
        whole, parts = found[case]
        for key in ("figures", "evaluated", "answers"):
            for one, other in zip(parts[key], whole[key], strict=True):
                assert one == pytest.approx(other, rel=1e-6), key
        if rank:
            assert parts["adapter"] == parts["optimizer"] == {}  # rank 0 has all
            continue
        for key in ("adapter", "optimizer"):
            if case.clip:
                assert tiny.difference(parts[key], whole[key]) <= 1e-6
            else:
                assert parts[key].keys() == whole[key].keys()
                assert all((parts[key][n] == whole[key][n]).all() for n in whole[key])


@pytest.mark.parametrize(("world_size", "case"), RUNS, ids=str)
def test_a_rank_has_its_part_alone(world_size: int, case: Case) -> None:
    for found in found_on(world_size):
        whole, parts = found[case]
        for own, values in zip(parts["values"], whole["values"], strict=True):
            assert own * world_size - values in range(256 * world_size)
        others = 4 * sum(parts["values"]) * (world_size - 1)  # fp32 copies
        moves = parts["gathered"][-1]
        assert moves == others
        assert whole["gathered"] == [0] * STEPS
        assert parts["sync_bytes"] == [4 * world_size * sum(parts["values"])] * STEPS
        shared = ("ADAPTER_MASTERS", "OPTIMIZER_MOMENTS") if case.offload else ("ADAPTERS",)
        for part in shared:
            assert parts["reserved"][part] < whole["reserved"][part]


def taken_over(start: Any) -> list[Any]:
    return [train(Case(), shard, start) for shard in (False, True)]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1)])
def test_a_state_goes_on_on_any_number_of_ranks(before: int, after: int) -> None:
    start = {key: found_on(before)[0][Case()][1][key] for key in ("adapter", "optimizer")}
    expected, parts = taken_over(start) if after == 1 else run_ranks(taken_over, after, start)[0]
    for key in ("adapter", "optimizer"):
        assert all((parts[key][n] == expected[key][n]).all() for n in expected[key])
        assert parts[key].keys() == expected[key].keys()
