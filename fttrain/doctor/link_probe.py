"""One rank of a link's check: ``python -m fttrain.doctor.link_probe all_reduce BACKEND DEVICE
SIZE_BYTES`` or ``... copy FROM TO SIZE_BYTES``.

Rank 0 prints the median time in seconds. A wrong result raises RuntimeError.
"""

import statistics
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as torch_dist

from fttrain.distributed.collectives import HandleGroup
from fttrain.distributed.rank_group import RankGroup
from fttrain.launcher.launch import die_with_parent
from fttrain.rig.exchange import Exchange, make, pattern

ROUNDS = 5


def all_reduce(backend: str, kind: str, size_bytes: int) -> float:
    """Median seconds of an all_reduce of ``size_bytes``. Raises RuntimeError for a wrong sum."""
    torch_dist.init_process_group(backend)
    rank, ranks = torch_dist.get_rank(), torch_dist.get_world_size()
    device = torch.device(kind, rank % torch.cuda.device_count() if kind == "cuda" else 0)
    if kind == "cuda":
        torch.cuda.set_device(device)
    exchange = make("all_reduce", size_bytes, RankGroup(rank, ranks, rank, device))
    seconds = _timed(exchange, f"{backend}, rank {rank}")
    torch_dist.destroy_process_group()
    return seconds


def copy(source: int, target: int, size_bytes: int) -> float:
    """Median seconds of a copy from one card to another. Raises RuntimeError for wrong bytes."""
    given, expected = (
        pattern(0, size_bytes, torch.uint8, torch.device("cuda", card)) for card in (source, target)
    )
    taken = torch.empty_like(expected)

    def start() -> HandleGroup:
        taken.copy_(given)
        return HandleGroup(())

    exchange = Exchange("a copy", size_bytes, taken.zero_, start, taken, expected)
    return _timed(exchange, f"card {source} to card {target}")


def _timed(exchange: Exchange, where: str) -> float:
    # With CPU memory no card is opened: another program may own it.
    cards = range(torch.cuda.device_count() if exchange.result.is_cuda else 0)

    def once() -> float:
        exchange.reset()
        _wait_for(cards)
        began = time.perf_counter()
        exchange.start().wait()
        _wait_for(cards)
        return time.perf_counter() - began

    once()  # the first use makes connections
    seconds = statistics.median(once() for _ in range(ROUNDS))
    fault = exchange.fault()
    if fault:
        raise RuntimeError(f"{where}: {fault}")
    return seconds


def _wait_for(cards: Sequence[int]) -> None:
    for card in cards:
        torch.cuda.synchronize(card)


def main(arguments: Sequence[str]) -> None:
    """Run one rank and print its seconds."""
    die_with_parent()
    name, *rest, size_bytes = arguments
    if name == "all_reduce":
        seconds = all_reduce(rest[0], rest[1], int(size_bytes))
    else:
        seconds = copy(int(rest[0]), int(rest[1]), int(size_bytes))
    print(seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
