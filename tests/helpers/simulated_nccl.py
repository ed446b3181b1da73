"""Collectives of one of two ranks over NCCL for ``simulated_streams``, with nobody there to answer.

Each communicator is a stream of its own. What is asked of it begins when the stream of whoever asks
has come that far, and ``wait`` orders the stream of whoever waits after it; until then the handle
keeps the tensors. Values are made up: the other rank adds nothing to a sum, has the same row in a
table by rank, and the rest of each layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

from fttrain.distributed import collectives
from fttrain.strategy import grad_reduce

RANKS = 2


class Handle:
    """In place of torch's Work."""

    def __init__(self, done: torch.cuda.Event, tensors: Sequence[Tensor]) -> None:
        self._done, self._tensors = done, tensors

    def wait(self) -> None:
        self._done.wait()
        self._tensors = ()


class Communicator:
    """In place of a process group and of what torch.distributed does with one."""

    def __init__(self, rank: int, layers: Sequence[Tensor]) -> None:
        """``layers``: uint8 (layer_bytes,) each, of which ``rank`` gathers the other one's part."""
        self._stream, self._other = torch.cuda.Stream(), 1 - rank
        self._parts = [layer.view(RANKS, -1) for layer in layers]
        self._own = [parts[rank].numpy().tobytes() for parts in self._parts]

    def all_reduce(self, flat: Tensor) -> None:
        if flat.dim() == 2:
            flat.add_(flat.flip(0))
        else:
            flat.mul_(1)

    def broadcast(self, tensor: Tensor) -> None:
        tensor.mul_(1)

    def all_gather(self, out: Tensor, shard: Tensor) -> None:
        parts = out.view(RANKS, -1)
        own, others = parts[1 - self._other], parts[self._other]
        if own.data_ptr() != shard.data_ptr():  # adapters are gathered in place
            own.copy_(shard)
        if out.dtype == torch.uint8:
            layer = self._own.index(shard.numpy().tobytes())
            others.copy_(self._parts[layer][self._other])
        else:
            others.mul_(1)

    def reduce_scatter(self, own: Tensor, flat: Tensor) -> None:
        own.add_(flat.view(RANKS, -1)[self._other])

    def send(self, tensor: Tensor) -> None:
        tensor.clone().sum()  # somebody reads what arrives

    def receive(self, tensor: Tensor) -> None:
        tensor.fill_(0.01)

    def start(self, work: Callable[..., None], *tensors: Tensor) -> Handle:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work(self, *tensors)
            done = torch.cuda.Event()
            done.record()
        return Handle(done, tensors)


@contextmanager
def simulated_nccl(rank: int, layers: Sequence[Tensor]) -> Iterator[None]:
    """What the process asks of torch.distributed in the block ``rank`` of two would ask of NCCL.

    ``layers``: uint8 (layer_bytes,) each, of the frozen base. Inside ``simulated_streams``.
    """
    everyone = Communicator(rank, layers)

    def asks(work: Callable[..., None], tensors: int = 1, waits: bool = True) -> Callable[..., Any]:
        def ask(*args: Any, group: Any = None, async_op: bool = not waits, **_: Any) -> Any:
            group = next((a for a in args if isinstance(a, Communicator)), group) or everyone
            handle = group.start(work, *args[:tensors])
            return handle if async_op else handle.wait()

        return ask

    stand_ins: dict[tuple[Any, str], Any] = {
        (torch.distributed, "is_initialized"): lambda: True,
        (torch.distributed, "get_backend"): lambda group=None: "nccl",
        (torch.distributed, "get_rank"): lambda group=None: rank,
        (torch.distributed, "get_world_size"): lambda group=None: RANKS,
        (torch.distributed, "new_group"): lambda *_, **__: Communicator(rank, layers),
        (torch.distributed, "all_reduce"): asks(Communicator.all_reduce),
        (torch.distributed, "broadcast"): asks(Communicator.broadcast),
        (torch.distributed, "isend"): asks(Communicator.send, waits=False),
        (torch.distributed, "irecv"): asks(Communicator.receive, waits=False),
        (collectives, "_all_gather_single"): asks(Communicator.all_gather, 2),
        (collectives, "_reduce_scatter_single"): asks(Communicator.reduce_scatter, 2),
        (grad_reduce, "_HostTimer"): grad_reduce._CudaTimer,
    }
    with pytest.MonkeyPatch.context() as patch:
        for (place, name), stand_in in stand_ins.items():
            patch.setattr(place, name, stand_in)
        yield
