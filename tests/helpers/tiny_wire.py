"""A model of how sends and receives of a pipeline's stages are worked off: none may wait for each
other in a circle.

What a stage does is recorded from the real link, in the order in which its host issues it. Then it
is played on the stages' devices: a device does what it was asked in order; a send or receive enters
a queue when the device comes to it; only the head of a queue is worked off, and only together with
its counterpart at the head of a queue of the peer.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Transfer:
    """One send or receive of a stage."""

    wire: "Wire"
    kind: str  # send | receive
    peer: int
    communicator: Any
    tag: int
    done: bool = False

    def wait(self) -> None:
        """The device of the stage waits for it here."""
        self.wire.programme.append(("wait", self))

    def meets(self, other: "Transfer") -> bool:
        """Whether they are two ends of one message."""
        ends = (self.wire.stage, self.peer) == (other.peer, other.wire.stage)
        same = (self.communicator, self.tag) == (other.communicator, other.tag)
        return ends and same and self.kind != other.kind


class Wire:
    """In place of ``torch.distributed`` under the link of one stage: it writes down what is asked.

    ``groups``: the ranks of each communicator that was made; None for all ranks.
    """

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.programme: list[tuple[str, Transfer]] = []
        self.groups: list[list[int] | None] = []

    def get_backend(self) -> str:
        return "nccl"

    def new_group(self, ranks: list[int] | None = None, timeout: Any = None) -> int:
        self.groups.append(ranks)
        return len(self.groups) - 1

    def isend(self, tensor: Any, to: int, group: int | None = None, tag: int = 0) -> Transfer:
        return self._issue("send", to, group, tag)

    def irecv(self, tensor: Any, source: int, group: int | None = None, tag: int = 0) -> Transfer:
        return self._issue("receive", source, group, tag)

    def _issue(self, kind: str, peer: int, group: int | None, tag: int) -> Transfer:
        ranks = None if group is None else self.groups[group]
        assert ranks is None or {self.stage, peer} <= set(ranks)
        transfer = Transfer(self, kind, peer, group, tag)
        self.programme.append(("issue", transfer))
        return transfer


def nccl(transfer: Transfer) -> Any:
    """A queue for each communicator of a stage."""
    return transfer.wire.stage, transfer.communicator


def staged(transfer: Transfer) -> Any:
    """gloo through host memory: one thread sends, each direction receives apart from the other."""
    way = "thread" if transfer.kind == "send" else transfer.peer
    return transfer.wire.stage, way


def stuck(wires: list[Wire], queue_of: Callable[[Transfer], Any]) -> list[int]:
    """The stages whose devices never come to the end of what ``wires`` say."""
    programmes = {wire.stage: deque(wire.programme) for wire in wires}
    queues: dict[Any, deque[Transfer]] = defaultdict(deque)
    moved = True
    while moved:
        moved = False
        for programme in programmes.values():
            while programme and (programme[0][0] == "issue" or programme[0][1].done):
                what, transfer = programme.popleft()
                if what == "issue":
                    queues[queue_of(transfer)].append(transfer)
                moved = True
        for queue in queues.values():
            met = [
                other for other in queues.values() if queue and other and queue[0].meets(other[0])
            ]
            for ended in [queue, *met] if met else []:
                ended.popleft().done = moved = True
    return [stage for stage, programme in programmes.items() if programme]
