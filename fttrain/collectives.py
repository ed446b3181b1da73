"""The collectives that move large buffers between ranks, each by the backend's fastest way."""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as torch_dist
from torch import Tensor


class Handle(Protocol):
    """Collectives under way."""

    def wait(self) -> Any:
        """Order the caller (the thread on the CPU, its current stream on CUDA) after them."""
        ...


class Handles:
    """Several as one. None among them: a send or receive that this rank has no part in."""

    def __init__(self, works: Sequence[Handle | None]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()


def all_gather(out: Tensor, shard: Tensor) -> Handle:
    """``shard`` (n,) of every rank, end to end, into ``out`` (world_size * n,) on all ranks.

    Every rank calls it in the same order. gloo's own all_gather passes pieces on from rank to rank:
    sending each shard straight to each rank was measured 2.6 to 8 times as fast on loopback
    (docs/lab-log.md). It sends no CUDA tensors; there, one broadcast a rank does the same.
    """
    world_size = torch_dist.get_world_size() if torch_dist.is_initialized() else 1
    if world_size == 1:
        out.copy_(shard, non_blocking=True)
        return Handles(())
    if torch_dist.get_backend() == "nccl":
        return Handles([_all_gather_single(out, shard, async_op=True)])
    rank, parts = torch_dist.get_rank(), out.view(world_size, -1)
    parts[rank].copy_(shard)
    if out.device.type == "cuda":
        return Handles(
            [torch_dist.broadcast(parts[src], src, async_op=True) for src in range(world_size)]
        )
    tag, works = next(_tags) % (1 << 16), []
    for distance in range(1, world_size):
        to, source = (rank + distance) % world_size, (rank - distance) % world_size
        works += [
            torch_dist.isend(shard, to, tag=tag),
            torch_dist.irecv(parts[source], source, tag=tag),
        ]
    return Handles(works)


_tags = itertools.count()  # the same on all ranks: two gathers under way are never mixed up
# PyTorch 2.13 has renamed it.
_all_gather_single = getattr(torch_dist, "all_gather_single", torch_dist.all_gather_into_tensor)
