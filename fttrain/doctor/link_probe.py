"""One rank of a check: ``python -m fttrain.doctor.link_probe all_reduce BACKEND DEVICE SIZE_BYTES``
or ``... copy FROM TO SIZE_BYTES``.

Rank 0 writes the median time in seconds, or raises where a result is not the known one.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fttrain.launch import die_with_parent

ROUNDS = 5
WHOLE = 1 << 20  # whole numbers below it, and sums of a few of them, are exact in fp32


def pattern(values: int, seed: int, device: torch.device) -> Tensor:
    """Whole numbers that each process can make for every other, fp32 (values,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WHOLE, (values,), generator=generator).float().to(device)


def all_reduce(backend: str, kind: str, size_bytes: int) -> float:
    """Median seconds of an all_reduce of so many bytes. Raises RuntimeError for a wrong sum."""
    torch_dist.init_process_group(backend)
    rank, ranks = torch_dist.get_rank(), torch_dist.get_world_size()
    device = torch.device(kind, rank % torch.cuda.device_count() if kind == "cuda" else 0)
    if kind == "cuda":
        torch.cuda.set_device(device)
    given = [pattern(size_bytes // 4, seed, device) for seed in range(ranks)]
    expected, flat = torch.stack(given).sum(0), torch.empty_like(given[rank])

    def exchange() -> None:
        flat.copy_(given[rank])
        torch_dist.all_reduce(flat)

    seconds = _timed(exchange, device)
    _compare(flat, expected, f"all_reduce over {backend}, rank {rank}")
    torch_dist.destroy_process_group()
    return seconds


def copy(source: int, target: int, size_bytes: int) -> float:
    """Median seconds of a copy from one card to another. Raises RuntimeError for wrong bytes."""
    given = pattern(size_bytes // 4, 1, torch.device("cuda", source))
    taken = torch.empty_like(given, device=torch.device("cuda", target))
    seconds = _timed(lambda: taken.copy_(given), taken.device)
    _compare(taken.cpu(), given.cpu(), f"a copy from card {source} to card {target}")
    return seconds


def _timed(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            for card in range(torch.cuda.device_count()):
                torch.cuda.synchronize(card)
        return time.perf_counter() - began

    once()  # connections are made at the first use
    return statistics.median(once() for _ in range(ROUNDS))


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    wrong = int((found != expected).sum())
    if wrong:
        raise RuntimeError(f"{what}: {wrong} of {found.numel()} values are wrong")


def main(arguments: Sequence[str]) -> None:
    """See above."""
    die_with_parent()
    name, *rest, size_bytes = arguments
    if name == "all_reduce":
        seconds = all_reduce(rest[0], rest[1], int(size_bytes))
    else:
        seconds = copy(int(rest[0]), int(rest[1]), int(size_bytes))
    print(seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
