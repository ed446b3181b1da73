"""How fast ranks talk: each collective at many sizes, its result compared with what is known."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from fttrain.distributed import collectives
from fttrain.distributed.collectives import HandleGroup
from fttrain.distributed.rank_group import RankGroup
from fttrain.rig import exchange
from fttrain.rig.profile import COLLECTIVES, LinkSample
from fttrain.rig.timing import LEAST, elapsed_s, repetitions
from fttrain.util.units import KIB, MIB

LEAST_BYTES = 64 * KIB
MOST_BYTES = {"cuda": 512 * MIB, "cpu": 64 * MIB}  # by device; it grows by factors of 4
RUNS = 4  # that one size takes at least: the first is not counted


class WrongResult(Exception):
    """A link brought something else than what was sent. The same on all ranks."""


def plan(
    true_bytes: Mapping[str, int], most_bytes: int, world_size: int
) -> list[tuple[str, int, bool]]:
    """(collective, bytes, whether it has to be measured) in the order of measuring: the model's own
    sizes first, then all collectives size by size. ``true_bytes``: by collective.
    """
    needed = [
        (name, exchange.rounded_bytes(true_bytes[name], world_size), True)
        for name in COLLECTIVES
        if name in true_bytes
    ]
    known = {(name, size_bytes) for name, size_bytes, _ in needed}
    wanted, size_bytes = list(needed), LEAST_BYTES
    while size_bytes <= most_bytes:
        rounded = exchange.rounded_bytes(size_bytes, world_size)
        wanted += [(name, rounded, False) for name in COLLECTIVES if (name, rounded) not in known]
        size_bytes *= 4 if size_bytes * 4 <= most_bytes else 2
    return wanted


def measure_link(
    group: RankGroup,
    true_bytes: Mapping[str, int],
    most_bytes: int,
    budget_s: float,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[LinkSample, ...]]:
    """Medians by collective, sizes ascending. Every rank calls it and gets the same.

    Sizes that ``budget_s`` leaves no time for are left out, but the model's own never are.
    Raises WrongResult where a result is not what it has to be.
    """
    wanted = plan(true_bytes, most_bytes, group.world_size)
    found: dict[str, list[LinkSample]] = {name: [] for name in COLLECTIVES}
    started = time.monotonic()
    for done, (name, size_bytes, needed) in enumerate(wanted):
        expected_s = RUNS * _expected_s(found[name], size_bytes)
        left_s = budget_s - group.maximum(time.monotonic() - started)
        if needed or expected_s <= left_s:
            share_s = max(0.0, left_s) / (len(wanted) - done)
            found[name].append(_measure(name, size_bytes, share_s, group))
        show(done + 1, len(wanted))
    return {
        name: tuple(sorted(samples, key=lambda sample: sample.size_bytes))
        for name, samples in found.items()
    }


def gradients_s(group: RankGroup, layers: int, gradient_bytes: int) -> float:
    """Seconds in which the adapter gradients of a step meet, as ``replicate`` launches them: a sum
    a layer, all under way before the first is waited for. The compute that hides them is not there.
    """
    trial = exchange.make("all_reduce", gradient_bytes, group)
    trial.reset()
    own = trial.result.clone()
    flats = [torch.empty_like(own) for _ in range(layers)]

    def step() -> None:
        HandleGroup([collectives.all_reduce(flat) for flat in flats]).wait()

    times = []
    for _ in range(1 + LEAST):
        for flat in flats:
            flat.copy_(own)
        group.barrier()
        times.append(elapsed_s(step, group.device))
        faults = (dataclasses.replace(trial, result=flat).fault() for flat in flats)
        _refuse_faults(next(filter(None, faults), ""), group)
    return group.maximum(statistics.median(times[1:]))


def _refuse_faults(fault: str, group: RankGroup) -> None:
    """Raises WrongResult on every rank where any has a ``fault``: that of the first of them."""
    if not group.any(bool(fault)):
        return
    problem = f"rank {group.rank}: {fault}" if fault else ""
    problems = [group.broadcast_str(problem, rank) for rank in range(group.world_size)]
    raise WrongResult(next(told for told in problems if told))


def _expected_s(samples: Sequence[LinkSample], size_bytes: int) -> float:
    """Of one run, at the rate of the largest size so far."""
    if not samples:
        return 0.0
    largest = max(samples, key=lambda sample: sample.size_bytes)
    return largest.seconds * size_bytes / largest.size_bytes


def _measure(name: str, size_bytes: int, budget_s: float, group: RankGroup) -> LinkSample:
    """The median of some runs: that of the rank that took longest."""
    trial = exchange.make(name, size_bytes, group)
    warm_up_s = group.maximum(_once(trial, group)[0])
    if group.device.type == "cuda":  # in the first run NCCL made its connections: seconds
        warm_up_s = group.maximum(_once(trial, group)[0])
    times = [_once(trial, group) for _ in range(repetitions(warm_up_s, budget_s))]
    seconds, cores_s = map(statistics.median, zip(*times, strict=True))
    return LinkSample(trial.size_bytes, group.maximum(seconds), group.maximum(cores_s))


def _once(trial: exchange.Exchange, group: RankGroup) -> tuple[float, float]:
    """Seconds of one run, from when all ranks are ready until this one has its result; and those
    of the processor's cores, by all threads of this process.
    """
    trial.reset()
    group.barrier()
    busy_s = time.process_time()
    seconds = elapsed_s(lambda: trial.start().wait(), group.device)
    busy_s = time.process_time() - busy_s
    _refuse_faults(trial.fault(), group)
    return seconds, busy_s
