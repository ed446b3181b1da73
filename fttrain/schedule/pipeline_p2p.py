"""What stages of a pipeline say to each other: a micro-batch's boundary activation on the way up,
its gradient on the way down, and nothing else.

Legend: N tokens of a micro-batch, C hidden width.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fttrain.distributed.collectives import Handle, HandleGroup
from fttrain.distributed.rank_group import RankGroup
from fttrain.distributed.timeouts import collective_timeout
from fttrain.store import Traffic
from fttrain.store.side_stream import collective_stream, device_thread

NEXT, PREV = 1, -1  # to the stage after this one, to the one before
TAGS = {NEXT: 1, PREV: 2}
AHEAD = 2  # sends that may be under way, and receives that are open ahead of their use


class PipelineP2P:
    """Sends to and receives from the stages beside this one, on its machine.

    Between GPUs over NCCL the tensors cross as they are. Where the backend sends no CUDA tensors
    (gloo) they go through page-locked host memory. The compute waits for no send but the last but
    ``AHEAD``; what was sent must not be overwritten.
    """

    def __init__(self, group: RankGroup, width: int, dtype: torch.dtype) -> None:
        """Every rank makes one at the same time."""
        self._group, self._width, self._dtype = group.intra_node, width, dtype
        self._first = group.rank - group.intra_node.rank  # rank of the first stage, among all ranks
        over_nccl = group.world_size > 1 and torch_dist.get_backend() == "nccl"
        self._staged = group.device.type == "cuda" and not over_nccl
        # (the lower stage of two neighbours, NEXT or PREV) -> what carries that, where it is not
        # what carries everything between the ranks of the machine
        self._ways: dict[tuple[int, int], Any] = _ways(group) if over_nccl else {}
        self._sender = device_thread(group.device, "stage-link") if self._staged else None
        # Handle and tensor of each send that may be under way
        self._sending: deque[tuple[Handle, Tensor]] = deque()
        # By where tensors travel to; they time how long the compute waits for one.
        where = torch.device("cpu") if self._staged else group.device
        self._receiving = {step: collective_stream(where, timed=True) for step in (NEXT, PREV)}
        self._stage_bytes = 0

    @property
    def is_first(self) -> bool:
        """No stage comes before this one."""
        return self._group.rank == 0

    @property
    def is_last(self) -> bool:
        """No stage comes after this one."""
        return self._group.rank == self._group.world_size - 1

    def send(self, tensor: Tensor, step: int) -> None:
        """``tensor`` (N, C) to the stage ``step`` (NEXT or PREV) of this one."""
        while len(self._sending) >= AHEAD:
            self._sending.popleft()[0].wait()
        tensor, to = tensor.contiguous(), self._neighbour(step)
        self._stage_bytes += tensor.numel() * tensor.element_size()
        if self._sender is not None:
            ranks = self._group.process_group
            handle: Handle = _StagedSend(self._sender, tensor, to, TAGS[step], ranks)
        else:
            work = torch_dist.isend(tensor, to, group=self._way(step, step), tag=TAGS[step])
            handle = HandleGroup([work])
        self._sending.append((handle, tensor))

    def inbox(self, rows: Sequence[int], step: int) -> "RecvQueue":
        """What the stage ``step`` of this one will send: tensors of ``rows`` tokens, in order."""
        return RecvQueue(self, rows, step)

    def receive(self, rows: int, step: int) -> "PendingRecv":
        """Start to receive (``rows``, C) from the stage ``step`` of this one."""
        device = torch.device("cpu") if self._staged else self._group.device
        buffer = torch.empty(
            rows, self._width, dtype=self._dtype, device=device, pin_memory=self._staged
        )
        source, travels = self._neighbour(step), -step
        way = self._way(step, travels)
        ticket = self._receiving[travels].run(
            lambda: torch_dist.irecv(buffer, source, group=way, tag=TAGS[travels])
        )
        return PendingRecv(ticket, buffer, self._group.device)

    def nothing(self, rows: int) -> Tensor:
        """Zeros (``rows``, C): what a stage sends that has nothing to say."""
        return torch.zeros(rows, self._width, dtype=self._dtype, device=self._group.device)

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def take_traffic(self) -> Traffic:
        """Bytes sent since the last call, and seconds for which the compute waited to receive."""
        sent, self._stage_bytes = self._stage_bytes, 0
        wait_s = sum(stream.take_wait_s() for stream in self._receiving.values())
        return Traffic(stage_bytes=sent, wait_s=wait_s)

    def _neighbour(self, step: int) -> int:
        """The stage ``step`` of this one, as a rank among all."""
        return self._first + self._group.rank + step

    def _way(self, step: int, travels: int) -> Any:
        """What carries tensors that travel NEXT or PREV between this stage and the one ``step`` of
        it.
        """
        lower = min(self._group.rank, self._group.rank + step)
        return self._ways.get((lower, travels), self._group.process_group)


def _ways(group: RankGroup) -> dict[tuple[int, int], Any]:
    """A communicator for each two neighbours of this machine and direction.

    NCCL works off what one communicator is given in order, and a send only together with its
    receive. A middle stage that opens its receives ahead would hold up its own sends by them, the
    stages around it would wait for those, and from four stages on nothing would ever move again.
    """
    stages, ways = group.intra_node.world_size, {}
    for first in range(0, group.world_size, stages):  # all ranks make all of them, in that order
        for lower, step in itertools.product(range(stages - 1), (NEXT, PREV)):
            ranks = [first + lower, first + lower + 1]
            made = torch_dist.new_group(ranks, timeout=collective_timeout())
            if group.rank in range(first, first + stages):
                ways[lower, step] = made
    return ways


class RecvQueue:
    """The receives of one direction, a few of them open ahead."""

    def __init__(self, link: PipelineP2P, rows: Sequence[int], step: int) -> None:
        self._link, self._rows, self._step = link, deque(rows), step
        self._open: deque[PendingRecv] = deque()

    def next(self) -> Tensor:
        """The next tensor (N, C) on the device. Where memory runs out it can be asked for again."""
        while self._rows and len(self._open) < AHEAD:
            self._open.append(self._link.receive(self._rows[0], self._step))
            self._rows.popleft()
        tensor = self._open[0].tensor()
        self._open.popleft()
        return tensor


@dataclass
class PendingRecv:
    """A tensor under way to this rank."""

    ticket: Handle
    buffer: Tensor  # (N, C)
    device: torch.device

    def tensor(self) -> Tensor:
        """(N, C) on the device, once it is here."""
        self.ticket.wait()
        return self.buffer.to(self.device, non_blocking=True)


class _StagedSend:
    """Copies to page-locked host memory; a thread sends that once the copy is complete."""

    def __init__(
        self, sender: ThreadPoolExecutor, tensor: Tensor, to: int, tag: int, ranks: Any
    ) -> None:
        self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._on_host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        self._sent = sender.submit(self._send, to, tag, ranks)

    def wait(self) -> None:
        self._sent.result()

    def _send(self, to: int, tag: int, ranks: Any) -> None:
        self._copied.synchronize()
        torch_dist.send(self._on_host, to, group=ranks, tag=tag)
