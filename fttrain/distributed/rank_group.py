"""Groups of ranks, and the small messages that ranks exchange.

On several nodes ranks are numbered node by node, as many on each, and every rank is in two more
groups:

    ranks        0 1 | 2 3      of two nodes
    intra_node   0 1 | 2 3      the ranks of one node
    inter_node   0 2 , 1 3      the ranks with one local rank, of every node

``world_size == 1`` needs no process group and runs the same code.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fttrain.distributed.node_heartbeat import NodeHeartbeat
from fttrain.util.errors import UserError

POLL_S = 1.0


@dataclass(frozen=True)
class RankGroup:
    """Ranks that work together: this rank among them, and its device."""

    rank: int  # among these
    world_size: int  # how many they are
    local_rank: int  # on its node
    device: torch.device
    process_group: torch_dist.ProcessGroup | None = None  # None: torch's group of all ranks
    intra: "RankGroup | None" = None  # of all ranks on several nodes: see ``intra_node``
    inter: "RankGroup | None" = None  # likewise, see ``inter_node``
    heartbeat: NodeHeartbeat | None = None  # on the first rank of each of several nodes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and talks to the user."""
        return self.rank == 0

    @property
    def intra_node(self) -> "RankGroup":
        """The ranks of this node."""
        return self.intra or self

    @property
    def inter_node(self) -> "RankGroup":
        """The ranks with this one's local rank on each node; ``rank`` is the number of the node and
        ``world_size`` the number of nodes.
        """
        return self.inter or RankGroup(0, 1, self.local_rank, self.device)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all ranks, in place, and return it."""
        if self.world_size > 1:
            torch_dist.all_reduce(tensor, group=self.process_group)
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
            torch_dist.all_reduce(values, torch_dist.ReduceOp.MAX, self.process_group)
        return float(values.item())

    def minimum(self, value: float) -> float:
        """The smallest ``value`` of any rank."""
        return -self.maximum(-value)

    def sum(self, value: int) -> int:
        """The sum of the ranks' ``value``."""
        return int(self.all_reduce_(torch.tensor(value, device=self.device)).item())

    def gather(self, values: list[float]) -> list[list[float]]:
        """The ``values`` of every rank, by rank; as many of them on each."""
        table = torch.zeros(self.world_size, len(values), dtype=torch.float64, device=self.device)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        rows: list[list[float]] = self.all_reduce_(table).tolist()
        return rows

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The ``tensor`` of rank ``source``, on every rank, on the host; ``tensor`` has the same
        shape and dtype on each.
        """
        if self.world_size == 1:
            return tensor
        on_device = tensor.to(self.device)
        self._broadcast_(on_device, source)
        return on_device.cpu()

    def broadcast_str(self, text: str, source: int = 0) -> str:
        """The ``text`` of rank ``source``, on every rank."""
        if self.world_size == 1:
            return text
        length = torch.tensor(len(text.encode()), device=self.device)
        self._broadcast_(length, source)
        if not (size_bytes := int(length.item())):
            return ""  # backends need not accept an empty tensor
        content = torch.zeros(size_bytes, dtype=torch.uint8, device=self.device)
        if self.rank == source:
            content.copy_(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
        self._broadcast_(content, source)
        return bytes(content.tolist()).decode()

    def broadcast_tensors(
        self, tensors: Mapping[str, Tensor], source: int = 0
    ) -> Iterator[tuple[str, Tensor]]:
        """The ``tensors`` of rank ``source``, one after the other, on every rank, on the host;
        ``tensors`` of the other ranks are ignored. Every rank must exhaust the iterator.
        """
        described = [
            (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        ]
        is_source = self.rank == source
        for name, shape, dtype in json.loads(self.broadcast_str(json.dumps(described), source)):
            tensor = tensors[name] if is_source else torch.empty(shape, dtype=getattr(torch, dtype))
            yield name, self.broadcast(tensor.contiguous(), source)

    def raise_everywhere(self, problem: str) -> None:
        """Raise UserError on every rank if any has a ``problem``: that of the first of them."""
        if not self.any(bool(problem)):
            return
        problems = [self.broadcast_str(problem, rank) for rank in range(self.world_size)]
        raise UserError(next(text for text in problems if text))

    @contextmanager
    def node_local_work(self, what: str) -> Iterator[None]:
        """Enclose work that each node does alone, maybe for hours: a node that is done waits for
        the others outside any collective, so no timeout of one applies.

        Every rank enters the block, and the ranks of a node leave it alike. ``what``: the work, for
        the message to the user. Raises, on every rank, the UserError of a node.
        """
        heartbeat = self.heartbeat
        try:
            yield
        except UserError as error:
            if heartbeat is not None:
                heartbeat.report_work(heartbeat.next_work_id(), str(error))
            raise
        if self.inter_node.world_size == 1:
            return
        work_id = 0
        if heartbeat is not None:
            work_id = heartbeat.next_work_id()
            heartbeat.report_work(work_id, "")
        announced = False
        while True:
            problem, missing = heartbeat.poll_work(work_id) if heartbeat is not None else ("", [])
            problem = self.intra_node.broadcast_str(problem)
            if problem:
                raise UserError(problem)
            if not self.intra_node.any(bool(missing)):
                return
            if self.is_main and not announced:
                print(f"{what}: waiting for {' and '.join(missing)}", flush=True)
                announced = True
            time.sleep(POLL_S)

    def raise_where_nodes_differ(self, what: Mapping[str, str], remedy: str) -> None:
        """Raise UserError, on every rank, where nodes differ in ``what`` (name -> value). The ranks
        of one node have read the same files, so one of them speaks for all.
        """
        if self.inter_node.world_size == 1:
            return
        text = json.dumps([os.uname().nodename, dict(what)])
        nodes = [json.loads(reply) for reply in self.from_each_node(text)]
        first_name, first = nodes[0]
        for number, (name, values) in enumerate(nodes):
            for key in (key for key in first if values.get(key) != first[key]):
                raise UserError(
                    f"{key} is {first[key]} on machine 0 ({first_name}) and {values.get(key)} on "
                    f"machine {number} ({name}): {remedy}"
                )

    def from_each_node(self, text: str) -> list[str]:
        """The ``text`` of the first rank of each node, by node."""
        step = self.intra_node.world_size
        return [self.broadcast_str(text, rank) for rank in range(0, self.world_size, step)]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.any(False)

    def _broadcast_(self, tensor: Tensor, source: int) -> None:
        torch_dist.broadcast(tensor, group=self.process_group, group_src=source)


def rank_from_environment() -> tuple[int, int, int]:
    """The (rank, world_size, local_rank) that the launcher has set; (0, 1, 0) without one."""
    variables = os.environ
    return (
        int(variables.get("RANK", 0)),
        int(variables.get("WORLD_SIZE", 1)),
        int(variables.get("LOCAL_RANK", 0)),
    )


def local_world_size() -> int:
    """The number of ranks on this node, as the launcher says; all ranks where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
