"""Collectives of one size with a known result, to measure a link and to check it.

The collectives of strategies are those of ``fttrain/distributed/collectives.py``. Each rank's bytes
are a random table that every other rank can make: a changed, missing or displaced byte is detected.
Sums are of whole numbers from 0 to 255, exact in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fttrain.distributed import collectives
from fttrain.distributed.collectives import Handle, HandleGroup
from fttrain.distributed.rank_group import RankGroup
from fttrain.util.units import round_up

# Values until the table repeats: a prime, so that no shift by a power of two goes unnoticed
PERIOD = 65521
SUM_DTYPE = torch.float32  # of adapter gradients


@dataclass(frozen=True)
class Exchange:
    """A collective that can run repeatedly."""

    name: str  # of the collective
    size_bytes: int  # of the whole tensor, as nccl-tests counts
    reset: Callable[[], object]  # restores the data before the collective
    start: Callable[[], Handle]
    result: Tensor
    expected: Tensor

    def fault(self) -> str:
        """The error in the result; "" where it is as expected."""
        if torch.equal(self.result, self.expected):
            return ""
        differing = (self.result != self.expected).nonzero().view(-1)
        return (
            f"{self.name} of {self.size_bytes} bytes: {len(differing)} of {self.result.numel()} "
            f"values are not what they have to be, the first at {int(differing[0])}"
        )


def pattern(rank: int, values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The data of ``rank``: whole numbers from 0 to 255, (values,) of ``dtype``."""
    generator = torch.Generator().manual_seed(1 + rank)
    table = torch.randint(0, 256, (min(values, PERIOD),), generator=generator)
    return table.to(device, dtype).repeat(-(-values // len(table)))[:values]


def rounded_bytes(size_bytes: int, world_size: int) -> int:
    """The next size that divides among the ranks, in whole fp32 values."""
    return round_up(size_bytes, world_size * SUM_DTYPE.itemsize)


def make(collective: str, size_bytes: int, group: RankGroup) -> Exchange:
    """The exchange of ``collective`` (one of ``profile.COLLECTIVES``) with ``size_bytes``, rounded
    up to divide among the ranks. Every rank makes the same one.
    """
    return _MAKERS[collective](rounded_bytes(size_bytes, group.world_size), group)


def _all_reduce(size_bytes: int, group: RankGroup) -> Exchange:
    flat, addend, total = _summed(size_bytes, group)
    return Exchange(
        "all_reduce",
        size_bytes,
        lambda: flat.copy_(addend),
        lambda: collectives.all_reduce(flat),
        flat,
        total,
    )


def _reduce_scatter(size_bytes: int, group: RankGroup) -> Exchange:
    flat, addend, total = _summed(size_bytes, group)
    part, expected = (whole.view(group.world_size, -1)[group.rank] for whole in (flat, total))
    return Exchange(
        "reduce_scatter",
        size_bytes,
        lambda: flat.copy_(addend),
        lambda: collectives.reduce_scatter(flat),
        part,
        expected,
    )


def _summed(size_bytes: int, group: RankGroup) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 (values,) each: a buffer, this rank's addend, the sum over the ranks."""
    values = size_bytes // SUM_DTYPE.itemsize
    total = torch.zeros(values, dtype=SUM_DTYPE, device=group.device)
    for rank in range(group.world_size):
        total += pattern(rank, values, SUM_DTYPE, group.device)
    addend = pattern(group.rank, values, SUM_DTYPE, group.device)
    return torch.empty_like(addend), addend, total


def _all_gather(size_bytes: int, group: RankGroup) -> Exchange:
    shard_bytes = size_bytes // group.world_size
    shards = [
        pattern(rank, shard_bytes, torch.uint8, group.device) for rank in range(group.world_size)
    ]
    expected, shard = torch.cat(shards), shards[group.rank]
    out = torch.empty_like(expected)
    return Exchange(
        "all_gather",
        size_bytes,
        out.zero_,
        lambda: collectives.all_gather(out, shard),
        out,
        expected,
    )


def _broadcast(size_bytes: int, group: RankGroup) -> Exchange:
    expected = pattern(0, size_bytes, torch.uint8, group.device)
    flat = torch.empty_like(expected)

    def reset() -> None:
        flat.zero_()
        if group.is_main:
            flat.copy_(expected)

    def start() -> Handle:
        return HandleGroup([torch_dist.broadcast(flat, 0, async_op=True)])

    return Exchange("broadcast", size_bytes, reset, start, flat, expected)


def _send_recv(size_bytes: int, group: RankGroup) -> Exchange:
    """Each rank sends to the next one and receives from the one before it, at the same time."""
    rank, ranks = group.rank, group.world_size
    to, source = (rank + 1) % ranks, (rank - 1) % ranks
    sent = pattern(rank, size_bytes, torch.uint8, group.device)
    expected = pattern(source, size_bytes, torch.uint8, group.device)
    received = torch.empty_like(sent)
    over_nccl = torch_dist.get_backend() == "nccl"
    staged = group.device.type == "cuda" and not over_nccl

    def start() -> Handle:
        if staged:
            return _through_host(sent, received, to, source)
        sides = [
            torch_dist.P2POp(torch_dist.irecv, received, source),  # first, as in collectives.py
            torch_dist.P2POp(torch_dist.isend, sent, to),
        ]
        return HandleGroup(torch_dist.batch_isend_irecv(sides))

    return Exchange("send_recv", size_bytes, received.zero_, start, received, expected)


def _through_host(sent: Tensor, received: Tensor, to: int, source: int) -> Handle:
    """Exchange through host memory, as ``PipelineP2P`` where the backend sends no CUDA tensors."""
    leaving, arriving = (
        torch.empty(sent.shape, dtype=sent.dtype, pin_memory=True) for _ in range(2)
    )
    arriving_work = torch_dist.irecv(arriving, source)
    leaving.copy_(sent)
    leaving_work = torch_dist.isend(leaving, to)
    HandleGroup([arriving_work, leaving_work]).wait()
    received.copy_(arriving)
    return HandleGroup(())


_MAKERS: dict[str, Callable[[int, RankGroup], Exchange]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "send_recv": _send_recv,
}
