"""The rate of a link: each collective at many sizes, with its result checked."""

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
MOST_BYTES = {"cuda": 512 * MIB, "cpu": 64 * MIB}  # by device; sizes grow by factors of 4
RUNS = 4  # at least, for each size; the first is not counted


class WrongResult(Exception):
    """A link delivered other data than was sent. Raised alike on all ranks."""


def plan(
    true_bytes: Mapping[str, int], most_bytes: int, world_size: int
) -> list[tuple[str, int, bool]]:
    """(collective, bytes, whether it must be measured) in the order of measuring: the model's own
    sizes first, then all collectives size by size. ``true_bytes``: the model's, by collective.
    """
    own_sizes = [
        (name, exchange.rounded_bytes(true_bytes[name], world_size), True)
        for name in COLLECTIVES
        if name in true_bytes
    ]
    known = {(name, size_bytes) for name, size_bytes, _ in own_sizes}
    sizes, size_bytes = list(own_sizes), LEAST_BYTES
    while size_bytes <= most_bytes:
        rounded = exchange.rounded_bytes(size_bytes, world_size)
        sizes += [(name, rounded, False) for name in COLLECTIVES if (name, rounded) not in known]
        size_bytes *= 4 if size_bytes * 4 <= most_bytes else 2
    return sizes


def measure_link(
    group: RankGroup,
    true_bytes: Mapping[str, int],
    most_bytes: int,
    budget_s: float,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[LinkSample, ...]]:
    """Medians by collective, sizes ascending. Every rank calls it and gets the same.

    Sizes beyond the budget of ``budget_s`` are left out, except the model's own. Raises WrongResult
    where a result is not the expected one.
    """
    sizes = plan(true_bytes, most_bytes, group.world_size)
    samples: dict[str, list[LinkSample]] = {name: [] for name in COLLECTIVES}
    started = time.monotonic()
    for done, (name, size_bytes, required) in enumerate(sizes):
        expected_s = RUNS * _expected_s(samples[name], size_bytes)
        left_s = budget_s - group.maximum(time.monotonic() - started)
        if required or expected_s <= left_s:
            part_s = max(0.0, left_s) / (len(sizes) - done)
            samples[name].append(_measure(name, size_bytes, part_s, group))
        show(done + 1, len(sizes))
    return {
        name: tuple(sorted(samples, key=lambda sample: sample.size_bytes))
        for name, samples in samples.items()
    }


def gradients_s(group: RankGroup, layers: int, gradient_bytes: int) -> float:
    """Seconds of a step's gradient reduction, as ``replicate`` launches it: one all_reduce for each
    layer, all in flight before the first is awaited, without compute to hide them.
    """
    trial = exchange.make("all_reduce", gradient_bytes, group)
    trial.reset()
    addend = trial.result.clone()
    flats = [torch.empty_like(addend) for _ in range(layers)]

    def step() -> None:
        HandleGroup([collectives.all_reduce(flat) for flat in flats]).wait()

    times = []
    for _ in range(1 + LEAST):
        for flat in flats:
            flat.copy_(addend)
        group.barrier()
        times.append(elapsed_s(step, group.device))
        faults = (dataclasses.replace(trial, result=flat).fault() for flat in flats)
        _refuse_faults(next(filter(None, faults), ""), group)
    return group.maximum(statistics.median(times[1:]))


def _refuse_faults(fault: str, group: RankGroup) -> None:
    """Raise WrongResult on every rank where any has a ``fault``: that of the first one."""
    if not group.any(bool(fault)):
        return
    problem = f"rank {group.rank}: {fault}" if fault else ""
    problems = [group.broadcast_str(problem, rank) for rank in range(group.world_size)]
    raise WrongResult(next(filter(None, problems)))


def _expected_s(samples: Sequence[LinkSample], size_bytes: int) -> float:
    """Seconds of one run, at the rate of the largest size so far."""
    if not samples:
        return 0.0
    largest = max(samples, key=lambda sample: sample.size_bytes)
    return largest.seconds * size_bytes / largest.size_bytes


def _measure(name: str, size_bytes: int, budget_s: float, group: RankGroup) -> LinkSample:
    """The median of some runs, of the slowest rank."""
    trial = exchange.make(name, size_bytes, group)
    warm_up_s = group.maximum(_once(trial, group)[0])
    if group.device.type == "cuda":  # in the first run NCCL makes its connections, for seconds
        warm_up_s = group.maximum(_once(trial, group)[0])
    times = [_once(trial, group) for _ in range(repetitions(warm_up_s, budget_s))]
    seconds, cores_s = map(statistics.median, zip(*times, strict=True))
    return LinkSample(trial.size_bytes, group.maximum(seconds), group.maximum(cores_s))


def _once(trial: exchange.Exchange, group: RankGroup) -> tuple[float, float]:
    """(seconds from when all ranks are ready until this one has its result, CPU seconds of all
    threads of this process).
    """
    trial.reset()
    group.barrier()
    busy_s = time.process_time()
    seconds = elapsed_s(lambda: trial.start().wait(), group.device)
    busy_s = time.process_time() - busy_s
    _refuse_faults(trial.fault(), group)
    return seconds, busy_s
