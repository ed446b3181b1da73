"""The process group: who this rank is, and the few things ranks say to each other.

``world_size == 1`` needs no process group and runs the same code.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fttrain.errors import UserError
from fttrain.peers import Mark, Watch

# Longer than the slowest step; a dead rank ends the others sooner.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Group:
    """This rank's place among the ranks, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            torch_dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank; the same answer everywhere."""
        flags = torch.tensor(int(flag), device=self.device)
        return bool(self.all_reduce_(flags).item())

    def all(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank; the same answer everywhere."""
        return not self.any(not flag)

    def maximum(self, value: float) -> float:
        """The largest ``value`` of any rank."""
        values = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch_dist.all_reduce(values, op=torch_dist.ReduceOp.MAX)
        return float(values.item())

    def minimum(self, value: float) -> float:
        """The smallest ``value`` of any rank."""
        return -self.maximum(-value)

    def sum(self, value: int) -> int:
        """The sum of the ranks' ``value``."""
        return int(self.all_reduce_(torch.tensor(value, device=self.device)).item())

    def gather(self, values: list[float]) -> list[list[float]]:
        """``values`` of every rank, by rank; as many of them everywhere."""
        table = torch.zeros(self.world_size, len(values), dtype=torch.float64, device=self.device)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        found: list[list[float]] = self.all_reduce_(table).tolist()
        return found

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """``tensor`` of rank ``source``, on every rank, on the host; as large everywhere."""
        if self.world_size == 1:
            return tensor
        there = tensor.to(self.device)
        torch_dist.broadcast(there, src=source)
        return there.cpu()

    def share(self, text: str, source: int = 0) -> str:
        """The ``text`` of rank ``source``, on every rank."""
        if self.world_size == 1:
            return text
        length = torch.tensor(len(text.encode()), device=self.device)
        torch_dist.broadcast(length, src=source)
        content = torch.zeros(int(length.item()), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            content.copy_(
                torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else content
            )
        torch_dist.broadcast(content, src=source)
        return bytes(content.tolist()).decode()

    def refuse_together(self, problem: str) -> None:
        """Raises UserError on every rank where any has a ``problem``: that of the first of them."""
        if not self.any(bool(problem)):
            return
        problems = [self.share(problem, rank) for rank in range(self.world_size)]
        raise UserError(next(found for found in problems if found))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world_size, local_rank) as the launcher set them; (0, 1, 0) without one."""
    variables = os.environ
    return (
        int(variables.get("RANK", 0)),
        int(variables.get("WORLD_SIZE", 1)),
        int(variables.get("LOCAL_RANK", 0)),
    )


def local_world_size() -> int:
    """Ranks on this machine, as the launcher says; all there are where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


@contextmanager
def process_group(device: torch.device, backend: str = "auto") -> Iterator[Group]:
    """Joins the ranks for the length of the block, over ``backend``: nccl, gloo, or auto for NCCL
    between GPUs and gloo between CPUs. gloo between GPUs goes through host memory.

    Where a rank dies or fails inside the block the others of its machine end too, with its name:
    by UserError, or by the end of the process where they cannot be reached (see peers.py).
    """
    rank, world_size, local_rank = rank_from_environment()
    group = Group(rank, world_size, local_rank, device)
    if world_size == 1 or torch_dist.is_initialized():
        yield group
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    torch_dist.init_process_group(
        backend, timeout=COLLECTIVE_TIMEOUT, device_id=device if backend == "nccl" else None
    )
    watch = _watch(group)
    try:
        yield group
        watch.left()
        torch_dist.destroy_process_group()
    except BaseException as error:
        reason = watch.failed(error)
        # It wakes the peers; NCCL's would wait for them, and the end of the process wakes them too.
        if backend == "gloo" and torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        if reason is not None:
            raise reason from error
        raise
    finally:
        watch.close()


def _watch(group: Group) -> Watch:
    """Every rank watches its peers from here on."""
    mark = Mark()
    addresses = [group.share(mark.address, source) for source in range(group.world_size)]
    watch = Watch(group.rank, mark, addresses)
    group.barrier()  # each mark stays until all have opened it
    return watch
