"""Two machines of two ranks train what four ranks of one machine do: the same bits where every rank
has the whole model, and in pipelines within rounding.

The machines are this one twice: ranks are told that they are on two.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import tiny
import tiny_strategy
import torch
import torch.distributed as torch_dist
from ranks import run_ranks

from fttrain.data.batch import MicroBatch, collate
from fttrain.distributed.process_group import split_by_node
from fttrain.distributed.rank_group import RankGroup
from fttrain.strategy.spec import StrategySpec
from fttrain.util.errors import UserError

RANKS, HERE = 4, 2
STEPS = 2
PROMPTS = [ids for ids, _ in tiny.documents((5, 1, 9))]
HOST = {"embedding": "host", "lm_head": "host"}
STORES: dict[str, dict[str, Any]] = {
    "replicate": {},
    "replicate, whole ends on the host": HOST,
    "shard": {"strategy": "shard", "group": 2},
    "shard, optim.shard": {"strategy": "shard", "shard": True, "offload": True},
    "stream": {"strategy": "stream", "resident_layers": (1, 3), **HOST},
    "stream, all": {"strategy": "stream", "group": 1},
    "pipeline": {"strategy": "pipeline"},
    "pipeline, on the host": {"strategy": "pipeline", "offload": True, **HOST},
}


@dataclass(frozen=True)
class Case:
    store: str = "replicate"
    here: int = HERE  # ranks of a machine
    clip: float = 0.05

    @property
    def spec(self) -> StrategySpec:
        made = tiny_strategy.variant(**STORES[self.store])
        return replace(made, optim=replace(made.optim, max_grad_norm=self.clip))

    @property
    def reference(self) -> "Case":
        return Case("replicate", RANKS, self.clip)


# Each rank has the norm of its part alone: where that clips, sums have another order.
CASES = [Case(store, clip=0.0 if "optim.shard" in store else 0.05) for store in STORES]


def this_group(here: int) -> RankGroup:
    rank = torch_dist.get_rank()
    return split_by_node(RankGroup(rank, torch_dist.get_world_size(), rank % here, tiny.CPU), here)


@functools.cache
def everything() -> list[tuple[dict[Case, dict[str, Any]], dict[str, Any], list[str]]]:
    """Of each rank: ``outcomes``, ``empty_on``, ``refusals``."""
    return run_ranks(on_rank, RANKS)


def on_rank() -> tuple[dict[Case, dict[str, Any]], dict[str, Any], list[str]]:
    return outcomes(), empty_on(1), refusals()


def found() -> list[dict[Case, dict[str, Any]]]:
    return [rank[0] for rank in everything()]


def outcome(case: Case) -> dict[str, Any]:
    gradients: dict[str, Any] = {}

    def accept(loss: float, grad_norm: float) -> bool:
        if not gradients:
            gradients.update(tiny.gradients(strategy.decoder))
        return True

    group = this_group(case.here)
    strategy = tiny_strategy.build(case.spec, tiny_strategy.base(), group)
    steps = [tiny_strategy.apply(strategy, step, accept) for step in range(STEPS)]
    states = {"adapter": strategy.adapter_state(), "optimizer": strategy.optimizer_state()}
    return {
        "gradients": gradients,  # of the first step
        "figures": [(s.loss, s.grad_norm, s.targets, s.tokens, s.updated) for s in steps],
        "states": {key: tiny_strategy.copied(state) for key, state in states.items()},
        "evaluated": tiny_strategy.evaluated(strategy),
        "answers": strategy.generate(PROMPTS, 4, stop={2}),
        "gather_bytes": [s.traffic.gather_bytes for s in steps],
        "layers": [layer.index for layer in strategy.decoder.layers],
    }


def outcomes() -> dict[Case, dict[str, Any]]:
    wanted = {*CASES, *(case.reference for case in CASES), Case("shard", RANKS)}
    return {case: outcome(case) for case in sorted(wanted, key=str)}


@pytest.mark.parametrize(
    "case", [case for case in CASES if "pipeline" not in case.store], ids=lambda case: case.store
)
def test_every_rank_has_the_bits_that_it_has_on_one_machine(case: Case) -> None:
    for rank in found():
        ours, expected = rank[case], rank[case.reference]
        for key in ("evaluated", "answers"):
            assert ours[key] == expected[key], key
        losses, norms = zip(*(step[:2] for step in ours["figures"]), strict=True)
        assert losses == tuple(step[0] for step in expected["figures"])
        if "optim.shard" not in case.store:  # a gradient there is a part
            assert norms == tuple(step[1] for step in expected["figures"])
            same_tensors(ours["gradients"], expected["gradients"])
    for key, state in found()[0][case.reference]["states"].items():
        same_tensors(found()[0][case]["states"][key], state)


def same_tensors(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("store", [store for store in STORES if "pipeline" in store])
def test_pipelines_side_by_side_differ_by_rounding(store: str) -> None:
    case = Case(store)
    expected = found()[0][case.reference]
    ours = [rank[case] for rank in found()]
    assert ours[0]["layers"] + ours[1]["layers"] == list(range(tiny_strategy.LAYERS))
    for one, same in ((ours[0], ours[2]), (ours[1], ours[3])):  # the same stage
        assert one["layers"] == same["layers"]
        same_tensors(one["gradients"], same["gradients"])
    gradients = {**ours[0]["gradients"], **ours[1]["gradients"]}
    assert tiny.difference(gradients, expected["gradients"]) <= 1e-5
    for step, (figures, theirs) in enumerate(
        zip(ours[0]["figures"], expected["figures"], strict=True)
    ):
        assert figures[2:] == theirs[2:]
        assert figures[:2] == pytest.approx(theirs[:2], rel=1e-5), step
    state = ours[0]["states"]
    for key, tensors in expected["states"].items():
        assert state[key].keys() == tensors.keys()
        assert all(state[key][name].shape == tensor.shape for name, tensor in tensors.items())
    for one in ours:
        assert one["figures"] == ours[0]["figures"]
        assert one["answers"] == expected["answers"]
        assert one["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)


def test_layers_travel_inside_a_machine_alone() -> None:
    """Half of each layer that is brought, from the one rank beside it, and not three quarters."""
    for rank in found():
        two, one = (rank[Case("shard", here)]["gather_bytes"] for here in (HERE, RANKS))
        assert all(one)
        assert [3 * gathered for gathered in two] == [2 * gathered for gathered in one]


def empty_on(machine: int) -> dict[str, Any]:
    """Steps in which one machine's pipeline has no token; over a communicator for each direction,
    as between GPUs.
    """
    with mock.patch.object(torch_dist, "get_backend", return_value="nccl"):
        spec = Case("pipeline").spec
        strategy = tiny_strategy.build(spec, tiny_strategy.base(), this_group(HERE))
    own, _ = strategy.data_parallel

    def batches(step: int) -> list[MicroBatch]:
        made = tiny_strategy.micro_batches(strategy, step)
        return [collate([], batch.index) for batch in made] if own == machine else made

    steps = [
        strategy.train_step(batches(step), step, tiny_strategy.LR, lambda loss, norm: True)
        for step in range(STEPS)
    ]
    return {
        "figures": [(s.loss, s.grad_norm, s.targets) for s in steps],
        "masters": tiny_strategy.adapters(strategy),
    }


def refusals() -> list[str]:
    """What ranks that are counted wrongly are told."""
    rank, told = torch_dist.get_rank(), []
    wrong: list[Callable[[], RankGroup]] = [
        lambda: split_by_node(RankGroup(rank, RANKS, rank, tiny.CPU), 2 if rank < 2 else 1),
        lambda: split_by_node(RankGroup(rank, RANKS, 0, tiny.CPU), 3),
        lambda: split_by_node(RankGroup(rank, RANKS, rank // 2, tiny.CPU), 2),  # 0 2 | 1 3
    ]
    for group in wrong:
        with pytest.raises(UserError) as refused:
            group()
        told.append(str(refused.value))
    group = this_group(HERE)
    with pytest.raises(UserError) as refused:
        group.raise_where_nodes_differ(
            {"data": "same", "seed": str(group.inter_node.rank)}, "the same helps"
        )
    group.raise_where_nodes_differ({"seed": "7"}, "")
    return [*told, str(refused.value)]


def test_a_pipeline_without_tokens_keeps_nobody_waiting() -> None:
    ranks = [rank[1] for rank in everything()]
    assert all(rank["figures"] == ranks[0]["figures"] for rank in ranks)
    assert all(norm > 0 and targets > 0 for _, norm, targets in ranks[0]["figures"])
    same_tensors(ranks[0]["masters"], ranks[2]["masters"])
    same_tensors(ranks[1]["masters"], ranks[3]["masters"])


def test_ranks_that_are_counted_wrongly_are_refused() -> None:
    for _, _, told in everything():
        uneven, indivisible, mixed, differing = told
        assert uneven.startswith("4 ranks, 1 and 2 of them on a machine: as many on each")
        assert indivisible.startswith("4 ranks, 3 of them on a machine")
        assert mixed.startswith("rank 1 is number 0 on its machine")
        assert differing.startswith("seed is 0 on machine 0 (")
        assert "and 1 on machine 1 (" in differing
