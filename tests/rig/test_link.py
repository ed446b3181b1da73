"""Collectives whose results are known: right ones are timed, a byte that flips is named."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from ranks import run_ranks

from fttrain.distributed import collectives
from fttrain.distributed.collectives import Handle, HandleGroup
from fttrain.distributed.rank_group import RankGroup
from fttrain.rig import exchange
from fttrain.rig.link import LEAST_BYTES, WrongResult, gradients_s, measure_link, plan
from fttrain.rig.profile import COLLECTIVES
from fttrain.util.units import KIB, MIB

TRUE_BYTES = {"all_reduce": 100_001, "all_gather": 3 * MIB}
ODD_BYTES = 262_147  # no whole number of values, or of parts


def test_sizes_begin_with_those_of_the_model_and_reach_the_largest() -> None:
    wanted = plan(TRUE_BYTES, 512 * MIB, 3)
    assert wanted[:2] == [("all_reduce", 100_008, True), ("all_gather", 3 * MIB, True)]
    assert not any(needed for *_, needed in wanted[2:])
    assert all(size_bytes % 12 == 0 for _, size_bytes, _ in wanted)  # 3 ranks, fp32
    assert len({(name, size_bytes) for name, size_bytes, _ in wanted}) == len(wanted)
    for name in COLLECTIVES:
        sizes = [size_bytes for other, size_bytes, needed in wanted if other == name and not needed]
        assert (sizes[0], sizes[-1]) == (65_544, 512 * MIB + 4)
        assert all(1.9 < later / size < 4.1 for size, later in itertools.pairwise(sizes))


def test_the_model_s_own_size_is_measured_once() -> None:
    wanted = plan({"broadcast": LEAST_BYTES}, MIB, 2)
    assert [found for found in wanted if found[:2] == ("broadcast", LEAST_BYTES)] == [
        ("broadcast", LEAST_BYTES, True)
    ]


def test_the_table_of_bytes_is_never_its_own_shifted_by_a_block() -> None:
    own = exchange.pattern(0, 4 * exchange.PERIOD, torch.uint8, torch.device("cpu"))
    assert not torch.equal(own, exchange.pattern(1, len(own), torch.uint8, own.device))
    for power in range(18):
        assert not torch.equal(own[: -(1 << power)], own[1 << power :])


@dataclasses.dataclass
class Flips:
    """Wraps a collective: once ``left`` runs are over, one byte that ``rank`` received is wrong."""

    rank: int
    left: int

    def make(self, collective: str, size_bytes: int, group: RankGroup) -> exchange.Exchange:
        right = _make(collective, size_bytes, group)

        def start() -> Handle:
            right.start().wait()
            self.left -= 1
            if self.left < 0 and group.rank == self.rank:
                right.result.view(torch.uint8)[-2] ^= 1
            return HandleGroup(())

        return dataclasses.replace(right, start=start)


_make = exchange.make


def on_rank(device: torch.device) -> dict[str, Any]:
    """Everything that needs ranks, in one start of them."""
    group = RankGroup(torch_dist.get_rank(), torch_dist.get_world_size(), 0, device)
    found: dict[str, Any] = {
        "faults": {name: one_run(name, group) for name in COLLECTIVES},
        "samples": measure_link(group, TRUE_BYTES, 256 * KIB, 2.0),
        "gradients": gradients_s(group, 3, 100_000),
        "no time": measure_link(group, TRUE_BYTES, 64 * MIB, 0.0),
    }
    for name in COLLECTIVES:
        exchange.make = Flips(1, 2).make
        try:
            measure_link(group, {name: ODD_BYTES}, 0, 0.0)
        except WrongResult as error:
            found[f"wrong {name}"] = str(error)
        finally:
            exchange.make = _make
    collectives.all_reduce = flip_last(collectives.all_reduce, group)
    try:
        gradients_s(group, 3, 100_000)
    except WrongResult as error:
        found["wrong gradients"] = str(error)
    return found


def flip_last(all_reduce: Callable[[torch.Tensor], Handle], group: RankGroup) -> Any:
    """All sums are right but every third: a byte of it is wrong on rank 1."""
    count = itertools.count(1)

    def flipped(flat: torch.Tensor) -> Handle:
        handle = all_reduce(flat)
        if next(count) % 3 == 0 and group.rank == 1:
            handle.wait()
            flat.view(torch.uint8)[7] ^= 1
        return handle

    return flipped


def one_run(name: str, group: RankGroup) -> tuple[str, str, list[float]]:
    """The fault before it ran, the fault after it, and what it left, as numbers."""
    trial = exchange.make(name, ODD_BYTES, group)
    trial.result.zero_()
    before = trial.fault()
    trial.reset()
    trial.start().wait()
    return before, trial.fault(), trial.result[-5:].tolist()


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return run_ranks(on_rank, 2, torch.device("cpu"))


def test_results_are_those_of_the_definitions(answers: list[dict[str, Any]]) -> None:
    size_bytes = exchange.rounded_bytes(ODD_BYTES, 2)
    values, half, cpu = size_bytes // 4, size_bytes // 2, torch.device("cpu")
    sums = sum(exchange.pattern(rank, values, torch.float32, cpu) for rank in range(2))
    own = [exchange.pattern(rank, size_bytes, torch.uint8, cpu) for rank in range(2)]
    for rank, answer in enumerate(answers):
        ends = {
            "all_reduce": sums[-5:],
            "reduce_scatter": sums[: values // 2][-5:] if rank == 0 else sums[-5:],
            "all_gather": own[1][:half][-5:],
            "broadcast": own[0][-5:],
            "send_recv": own[1 - rank][-5:],
        }
        for name, (before, after, left) in answer["faults"].items():
            assert "values are not what they have to be" in before
            assert (after, left) == ("", ends[name].tolist()), name


def test_every_collective_is_timed_the_same_on_all_ranks(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["samples"] == answers[1]["samples"]
    for name in COLLECTIVES:
        sizes = [sample.size_bytes for sample in answers[0]["samples"][name]]
        own = [exchange.rounded_bytes(TRUE_BYTES[name], 2)] if name in TRUE_BYTES else []
        assert sizes == sorted([64 * KIB, 256 * KIB, *own])
        assert all(sample.seconds > 0 for sample in answers[0]["samples"][name])


def test_without_time_the_model_s_sizes_are_measured_all_the_same(
    answers: list[dict[str, Any]],
) -> None:
    sizes = {
        name: [sample.size_bytes for sample in samples]
        for name, samples in answers[0]["no time"].items()
    }
    assert sizes == {
        name: [exchange.rounded_bytes(TRUE_BYTES[name], 2)] if name in TRUE_BYTES else sizes[name]
        for name in COLLECTIVES
    }
    # Of the others the first size alone, of which nobody knows how long it takes.
    assert all(len(found) <= 1 for found in sizes.values())


def test_gradients_of_a_step_are_checked_layer_by_layer(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["gradients"] == answers[1]["gradients"] > 0
    for answer in answers:
        assert answer["wrong gradients"].startswith(
            "rank 1: all_reduce of 100000 bytes: 1 of 25000 values are not what they have to be"
        )


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_byte_that_flips_is_named_on_all_ranks(name: str, answers: list[dict[str, Any]]) -> None:
    size_bytes = exchange.rounded_bytes(ODD_BYTES, 2)
    for answer in answers:
        assert answer[f"wrong {name}"].startswith(f"rank 1: {name} of {size_bytes} bytes: 1 of "), (
            answer
        )


@pytest.mark.cuda
def test_two_ranks_on_one_card(answers: list[dict[str, Any]]) -> None:
    on_card = run_ranks(on_rank, 2, torch.device("cuda", 0))
    for answer, expected in zip(on_card, answers, strict=True):
        assert answer.keys() == expected.keys()
        assert answer["faults"] == expected["faults"]
        assert all(answer[name] == expected[name] for name in expected if name.startswith("wrong "))
