"""Where the memory of a run's ranks goes, in the first step and over the others."""

import json
from typing import Any

from fttrain.memory.report import PartUsage, part_usage, usage_table
from fttrain.memory.sampling import sample
from fttrain.training.session import TrainSession
from fttrain.util.atomic_files import write_json


def report_memory(run: TrainSession) -> None:
    """Where memory went in the first step, of each rank into memory.json; the fullest one is shown.

    Every rank calls it.
    """
    ranks = memory_uses(run)
    if run.group.is_main:
        write_json(run.output / "memory.json", {"step": run.step, "ranks": ranks})
        show_fullest(run, ranks, f"step {run.step}")


def memory_uses(run: TrainSession) -> list[list[dict[str, Any]]]:
    """Each rank's parts of memory so far (``PartUsage``), by rank. Every rank calls it."""
    usages = part_usage(run.strategy.reservations, run.group.device)
    written = json.dumps([usage.to_json() for usage in usages])
    return [
        json.loads(run.group.broadcast_str(written, rank)) for rank in range(run.group.world_size)
    ]


def show_fullest(run: TrainSession, ranks: list[list[dict[str, Any]]], when: str) -> None:
    """What ``memory_uses`` says of the rank with the fullest card."""
    fullest = max(range(len(ranks)), key=lambda rank: sum(u["device_bytes"] for u in ranks[rank]))
    shown = [PartUsage.from_json(use) for use in ranks[fullest]]
    for line in usage_table(shown, f"memory of rank {fullest} in {when}"):
        run.say(line)


def sample_memory(run: TrainSession) -> list[dict[str, int]]:
    """Every rank's memory as it is now, by rank. Every rank calls it."""
    own = sample(run.group.device)
    ranks = run.group.gather([float(size_bytes) for size_bytes in own.values()])
    return [dict(zip(own, map(int, figures), strict=True)) for figures in ranks]
