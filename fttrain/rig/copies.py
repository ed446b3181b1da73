"""Copies between a card and the host, from page-locked memory and from pageable memory.

Ranks take turns, each card alone while the others rest; then all cards copy at once.
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
COPIES = 8  # queued one after the other where directions or cards copy concurrently


@dataclass(frozen=True)
class _Copy:
    """A copy in one direction."""

    target: Tensor
    source: Tensor

    def start(self) -> None:
        self.target.copy_(self.source, non_blocking=True)


def copy_rates(group: RankGroup, device: torch.device) -> tuple[CopyRates, CopyRates]:
    """(host to card, card to host). A CPU has no such copies: every rate is None there.

    ``group``: all ranks of the machine. Every rank calls it at the same time.
    """
    if device.type != "cuda":
        return CopyRates(), CopyRates()
    on_card, leaving = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    locked, landing = (torch.zeros(COPY_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2))
    pageable = torch.zeros(COPY_BYTES, dtype=torch.uint8)  # each page touched
    to_card, to_host = _Copy(on_card, locked), _Copy(landing, leaving)
    both = (to_card, to_host)
    for turn in range(group.world_size):
        group.barrier()
        if turn == group.rank:
            pinned = [_rate(way, device) for way in both]
            plain = [
                _rate(way, device) for way in (_Copy(on_card, pageable), _Copy(pageable, leaving))
            ]
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


def _rate(way: _Copy, device: torch.device) -> float:
    return COPY_BYTES / median_s(way.start, device)


def _queue(way: _Copy) -> None:
    for _ in range(COPIES):
        way.start()


def _both_ways(to_card: _Copy, to_host: _Copy, device: torch.device) -> list[float]:
    """Bytes/s of each direction while the other is busy as well.

    Both queues begin together. When the first one ends, the last copies of the other run alone: its
    rate counts only the copies that ended before.
    """
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    events: list[list[torch.cuda.Event]] = [[], []]
    for _ in range(COPIES + 1):  # in turn: no queue gets a head start
        for way, stream, recorded in zip((to_card, to_host), streams, events, strict=True):
            with torch.cuda.stream(stream):
                way.start()
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                recorded.append(event)
    torch.cuda.synchronize(device)
    # From the end of each direction's first copy: by then both are in flight.
    times = [[recorded[0].elapsed_time(end) / 1e3 for end in recorded[1:]] for recorded in events]
    shorter = min(ends_s[-1] for ends_s in times)
    rates = []
    for ends_s in times:
        inside = [seconds for seconds in ends_s if seconds <= shorter] or ends_s[:1]
        rates.append(len(inside) * COPY_BYTES / inside[-1])
    return rates
