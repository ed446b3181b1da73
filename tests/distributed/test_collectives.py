"""Gathers over gloo, one and two at once, on every rank count up to four."""

import pytest
import torch
import torch.distributed
from ranks import run_ranks
from torch import Tensor

from fttrain.distributed.collectives import HandleGroup, all_gather

BYTES = 5000  # a shard's


def shard(rank: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.randint(256, (BYTES,), dtype=torch.uint8, generator=generator)


def gather(world_size: int) -> list[Tensor]:
    """One gather; two at once, waited for in the other order; many, each waited for."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    outs = [torch.zeros(world_size * BYTES, dtype=torch.uint8) for _ in range(23)]
    all_gather(outs[0], shard(rank, 0)).wait()
    first, second = (all_gather(outs[number], shard(rank, number)) for number in (1, 2))
    second.wait()
    first.wait()
    for number in range(3, len(outs)):
        all_gather(outs[number], shard(rank, number)).wait()
    return outs


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_gets_every_shard_in_rank_order(world_size: int) -> None:
    ranks = [gather(1)] if world_size == 1 else run_ranks(gather, world_size, world_size)
    for outs in ranks:
        for number, out in enumerate(outs):
            expected = torch.cat([shard(rank, number) for rank in range(world_size)])
            assert torch.equal(out, expected), number


def test_handles_wait_for_all_that_there_are() -> None:
    waited = []

    class Handle:
        def wait(self) -> None:
            waited.append(self)

    one, other = Handle(), Handle()
    HandleGroup([one, None, other]).wait()
    assert waited == [one, other]
