"""Copies between a card and the host, from page-locked memory and from pageable memory.

Ranks measure together: each card by itself while the others rest, then all of them at once.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup
from fttrain.rig.profile import CopyRates
from fttrain.rig.timing import elapsed_s, median_s
from fttrain.util.units import MIB

COPY_BYTES = 256 * MIB
COPIES = 8  # queued one after the other where directions or cards run beside each other


@dataclass(frozen=True)
class _Way:
    """One direction."""

    target: Tensor
    source: Tensor

    def copy(self) -> None:
        self.target.copy_(self.source, non_blocking=True)


def copy_rates(group: RankGroup, device: torch.device) -> tuple[CopyRates, CopyRates]:
    """(host to card, card to host). A CPU has no such copies: every rate is None there.

    ``group``: all ranks of the machine. Every rank calls it at the same time.
    """
    if device.type != "cuda":
        return CopyRates(), CopyRates()
    on_card, away = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    locked, other = (torch.zeros(COPY_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2))
    pageable = torch.zeros(COPY_BYTES, dtype=torch.uint8)  # each page touched
    to_card, to_host = _Way(on_card, locked), _Way(other, away)
    both = (to_card, to_host)
    for turn in range(group.world_size):
        group.barrier()
        if turn == group.rank:
            pinned = [_rate(way, device) for way in both]
            plain = [_rate(way, device) for way in (_Way(on_card, pageable), _Way(pageable, away))]
            duplex = _both_ways(*both, device)
    together = []
    for way in both:
        group.barrier()
        seconds = elapsed_s(functools.partial(_queue, way), device)
        together.append(COPIES * COPY_BYTES / seconds)
    first, second = (
        CopyRates(*rates) for rates in zip(pinned, plain, duplex, together, strict=True)
    )  # in the order of its fields
    return first, second


def _rate(way: _Way, device: torch.device) -> float:
    return COPY_BYTES / median_s(way.copy, device)


def _queue(way: _Way) -> None:
    for _ in range(COPIES):
        way.copy()


def _both_ways(to_card: _Way, to_host: _Way, device: torch.device) -> list[float]:
    """Bytes a second of each direction, while the other one is busy as well.

    Both queues begin together. The one that is done first had company all the time; the other's
    last copies had not, so of it only what fits into the first one's time is right: the rate is
    taken from copies that ended before that.
    """
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    marks: list[list[torch.cuda.Event]] = [[], []]
    for _ in range(COPIES + 1):  # in turn, so that no queue gets a head start
        for way, stream, ends in zip((to_card, to_host), streams, marks, strict=True):
            with torch.cuda.stream(stream):
                way.copy()
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                ends.append(event)
    torch.cuda.synchronize(device)
    # From the end of each way's first copy: by then both are under way.
    times = [[ends[0].elapsed_time(end) / 1e3 for end in ends[1:]] for ends in marks]
    shorter = min(found[-1] for found in times)
    rates = []
    for found in times:
        inside = [seconds for seconds in found if seconds <= shorter] or found[:1]
        rates.append(len(inside) * COPY_BYTES / inside[-1])
    return rates
