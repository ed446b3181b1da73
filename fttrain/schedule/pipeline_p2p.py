"""Point-to-point traffic between pipeline stages: a micro-batch's boundary activation to the next
stage, and the boundary's gradient to the previous one.

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

NEXT, PREV = 1, -1  # the neighbour after this stage, the one before; the direction towards it
TAGS = {NEXT: 1, PREV: 2}  # by direction
AHEAD = 2  # sends that may be under way, and receives that are started ahead of their use


class PipelineP2P:
    """Sends to and receives from the neighbouring stages on this node.

    NCCL sends tensors from GPU to GPU. Where the backend sends no CUDA tensors (gloo) they go
    through page-locked host memory. Up to ``AHEAD`` sends are under way before ``send`` waits for
    the oldest. A tensor that was sent must not be overwritten.
    """

    def __init__(self, group: RankGroup, width: int, dtype: torch.dtype) -> None:
        """``width``: C; ``dtype``: of the boundary. A collective call: all ranks take part."""
        self._group, self._width, self._dtype = group.intra_node, width, dtype
        self._first = group.rank - group.intra_node.rank  # rank of the first stage, among all ranks
        over_nccl = group.world_size > 1 and torch_dist.get_backend() == "nccl"
        self._staged = group.device.type == "cuda" and not over_nccl
        # (the lower stage of two neighbours, direction) -> its communicator; empty: all traffic
        # uses the node's process group
        self._communicators: dict[tuple[int, int], Any] = _communicators(group) if over_nccl else {}
        self._sender = device_thread(group.device, "stage-p2p") if self._staged else None
        # Handle and tensor of each send that may be under way
        self._sending: deque[tuple[Handle, Tensor]] = deque()
        # By direction; timed, so that they count how long the compute waits for a receive
        device = torch.device("cpu") if self._staged else group.device
        self._receiving = {
            direction: collective_stream(device, timed=True) for direction in (NEXT, PREV)
        }
        self._stage_bytes = 0

    @property
    def is_first(self) -> bool:
        """Whether no stage comes before this one."""
        return self._group.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether no stage comes after this one."""
        return self._group.rank == self._group.world_size - 1

    def send(self, tensor: Tensor, neighbour: int) -> None:
        """Send ``tensor`` (N, C) to ``neighbour``, NEXT or PREV."""
        while len(self._sending) >= AHEAD:
            self._sending.popleft()[0].wait()
        tensor, rank, tag = tensor.contiguous(), self._rank(neighbour), TAGS[neighbour]
        self._stage_bytes += tensor.numel() * tensor.element_size()
        if self._sender is not None:
            process_group = self._group.process_group
            handle: Handle = _StagedSend(self._sender, tensor, rank, tag, process_group)
        else:
            communicator = self._communicator(neighbour, direction=neighbour)
            handle = HandleGroup([torch_dist.isend(tensor, rank, group=communicator, tag=tag)])
        self._sending.append((handle, tensor))

    def recv_queue(self, rows: Sequence[int], neighbour: int) -> "RecvQueue":
        """The receives from ``neighbour``: one tensor (N, C) for each N of ``rows``, in order."""
        return RecvQueue(self, rows, neighbour)

    def receive(self, rows: int, neighbour: int) -> "PendingRecv":
        """Start to receive (``rows``, C) from ``neighbour``, NEXT or PREV."""
        device = torch.device("cpu") if self._staged else self._group.device
        buffer = torch.empty(
            rows, self._width, dtype=self._dtype, device=device, pin_memory=self._staged
        )
        source, direction = self._rank(neighbour), -neighbour
        communicator = self._communicator(neighbour, direction)
        handle = self._receiving[direction].run(
            lambda: torch_dist.irecv(buffer, source, group=communicator, tag=TAGS[direction])
        )
        return PendingRecv(handle, buffer, self._group.device)

    def zeros(self, rows: int) -> Tensor:
        """Zeros (``rows``, C), which a stage sends after it ran out of memory."""
        return torch.zeros(rows, self._width, dtype=self._dtype, device=self._group.device)

    def flush(self) -> None:
        """Wait until all sends are complete."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def take_traffic(self) -> Traffic:
        """Bytes sent since the last call, and seconds for which the compute waited to receive."""
        sent, self._stage_bytes = self._stage_bytes, 0
        wait_s = sum(stream.take_wait_s() for stream in self._receiving.values())
        return Traffic(stage_bytes=sent, wait_s=wait_s)

    def _rank(self, neighbour: int) -> int:
        """The neighbour's rank among all ranks."""
        return self._first + self._group.rank + neighbour

    def _communicator(self, neighbour: int, direction: int) -> Any:
        """The communicator between this stage and ``neighbour`` for tensors in ``direction``."""
        lower = min(self._group.rank, self._group.rank + neighbour)
        return self._communicators.get((lower, direction), self._group.process_group)


def _communicators(group: RankGroup) -> dict[tuple[int, int], Any]:
    """A communicator for each pair of neighbours of this node and each direction.

    One NCCL communicator runs its operations in order, and a send only together with its receive. A
    middle stage that starts receives ahead would block its own sends behind them, and its
    neighbours would wait for these sends: from four stages on that is a deadlock.
    """
    stages, communicators = group.intra_node.world_size, {}
    # new_group is collective: all ranks create all communicators, in this order.
    for first in range(0, group.world_size, stages):
        for lower, direction in itertools.product(range(stages - 1), (NEXT, PREV)):
            ranks = [first + lower, first + lower + 1]
            communicator = torch_dist.new_group(ranks, timeout=collective_timeout())
            if group.rank in range(first, first + stages):
                communicators[lower, direction] = communicator
    return communicators


class RecvQueue:
    """The receives from one neighbour, ``AHEAD`` of them started ahead of their use."""

    def __init__(self, p2p: PipelineP2P, rows: Sequence[int], neighbour: int) -> None:
        self._p2p, self._rows, self._neighbour = p2p, deque(rows), neighbour
        self._pending: deque[PendingRecv] = deque()

    def next(self) -> Tensor:
        """The next tensor (N, C) on the device. A call that ran out of memory can be repeated."""
        while self._rows and len(self._pending) < AHEAD:
            self._pending.append(self._p2p.receive(self._rows[0], self._neighbour))
            self._rows.popleft()
        tensor = self._pending[0].tensor()
        self._pending.popleft()
        return tensor


@dataclass
class PendingRecv:
    """A receive under way."""

    handle: Handle
    buffer: Tensor  # (N, C)
    device: torch.device

    def tensor(self) -> Tensor:
        """Wait for the receive. Return the tensor (N, C) on the device."""
        self.handle.wait()
        return self.buffer.to(self.device, non_blocking=True)


class _StagedSend:
    """A send through page-locked host memory: a thread sends the copy once it is complete."""

    def __init__(
        self, sender: ThreadPoolExecutor, tensor: Tensor, rank: int, tag: int, process_group: Any
    ) -> None:
        self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._on_host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        self._sent = sender.submit(self._send, rank, tag, process_group)

    def wait(self) -> None:
        self._sent.result()

    def _send(self, rank: int, tag: int, process_group: Any) -> None:
        self._copied.synchronize()
        torch_dist.send(self._on_host, rank, group=process_group, tag=tag)
