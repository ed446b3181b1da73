"""Collectives on large buffers, each by the backend's fastest way."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch.distributed as torch_dist
from torch import Tensor


class Handle(Protocol):
    """Collectives under way."""

    def wait(self) -> Any:
        """Order the caller (the thread on the CPU, its current stream on CUDA) after them."""
        ...


class HandleGroup:
    """Several handles as one. None among them: a send or receive that this rank has no part in."""

    def __init__(self, handles: Sequence[Handle | None]) -> None:
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            if handle is not None:
                handle.wait()


def all_gather(out: Tensor, shard: Tensor, group: torch_dist.ProcessGroup | None = None) -> Handle:
    """Gather every rank's ``shard`` (n,), end to end, into ``out`` (world_size * n,) on all ranks.

    ``group``: the ranks; None: all. Each of them calls it in the same order. gloo's own all_gather
    passes pieces on from rank to rank: sending each shard straight to each rank was measured 2.6 to
    8 times as fast on loopback (docs/lab-log.md). gloo sends no CUDA tensors; for these there is
    one broadcast a rank.
    """
    world_size = torch_dist.get_world_size(group) if torch_dist.is_initialized() else 1
    if world_size == 1:
        out.copy_(shard, non_blocking=True)
        return HandleGroup(())
    if torch_dist.get_backend() == "nccl":
        return HandleGroup([_all_gather_single(out, shard, group=group, async_op=True)])
    rank, parts = torch_dist.get_rank(group), out.view(world_size, -1)
    parts[rank].copy_(shard)
    if out.device.type == "cuda":
        return HandleGroup(
            [
                torch_dist.broadcast(parts[src], group=group, async_op=True, group_src=src)
                for src in range(world_size)
            ]
        )
    tag, others = next(_tags[group]) % (1 << 16), range(1, world_size)
    # Receives first: gloo tells the peer over the same connection that it may send. Behind a shard
    # this word would arrive after the shard, and the two directions would take turns.
    sources = [(rank - distance) % world_size for distance in others]
    receives = [
        torch_dist.irecv(parts[source], group=group, tag=tag, group_src=source)
        for source in sources
    ]
    targets = [(rank + distance) % world_size for distance in others]
    sends = [torch_dist.isend(shard, group=group, tag=tag, group_dst=target) for target in targets]
    return HandleGroup([*receives, *sends])


def all_reduce(flat: Tensor, group: torch_dist.ProcessGroup | None = None) -> Handle:
    """Sum ``flat`` over the ranks of ``group`` (None: all), in place."""
    handle: Handle = torch_dist.all_reduce(flat, group=group, async_op=True)
    return handle


def reduce_scatter(flat: Tensor) -> Handle:
    """Sum this rank's part of ``flat`` (values,), one of ``world_size`` equal parts, over all
    ranks, in place; the other parts are undefined afterwards.

    gloo's own reduce_scatter was measured 0.8 times as fast as its all_reduce from 4 MB on
    (docs/lab-log.md): there all_reduce stands in for it.
    """
    if torch_dist.get_backend() != "nccl":
        return all_reduce(flat)
    part = flat.view(torch_dist.get_world_size(), -1)[torch_dist.get_rank()]
    handle: Handle = _reduce_scatter_single(part, flat, async_op=True)
    return handle


# The next tag of each group, the same on all its ranks: two gathers under way are never mixed up
_tags: dict[Any, Iterator[int]] = defaultdict(itertools.count)
# PyTorch 2.13 has renamed these two.
_all_gather_single = getattr(torch_dist, "all_gather_single", torch_dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(
    torch_dist, "reduce_scatter_single", torch_dist.reduce_scatter_tensor
)
