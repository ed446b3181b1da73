"""The memory of a run's ranks, as report.md shows it.

memory.json   {"step", "ranks": [[{"part", "device_bytes", "host_bytes"}, ...], ...]}, by rank
memory.jsonl  a line now and then: {"step", "ranks": [{name: bytes}, ...]}, by rank; the names are
              those of ``fttrain.memory.sampling.sample``, of a run on CPUs without the device's; of
              GPUs "cards": [{name: figure}, ...] beside them, named as in ``fttrain.rig.telemetry``
"""

import json
from pathlib import Path

from fttrain.track.metrics import read_metrics
from fttrain.util.units import GIB

Sample = tuple[int, list[dict[str, int]]]  # step; each rank's figures, in bytes
CardSample = tuple[int, list[dict[str, float]]]  # step; the figures of each rank's card


def memory_section(path: Path) -> str | None:
    """Markdown of memory.json; None where it is not there or not whole."""
    try:
        written = json.loads(path.read_bytes())
        ranks = [
            [(use["part"], use["device_bytes"], use["host_bytes"]) for use in rank]
            for rank in written["ranks"]
        ]
        names = dict.fromkeys(part for rank in ranks for part, _, _ in rank)
        step = int(written["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    heads = [f"rank {rank}, {place}" for rank in range(len(ranks)) for place in ("device", "host")]
    lines = [
        f"## Memory in step {step}, GiB",
        "",
        f"| part | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for name in names:
        cells = [_cell(rank, name, place) for rank in ranks for place in (1, 2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rank: list[tuple[str, int, int]], name: str, place: int) -> str:
    size_bytes = sum(int(use[place]) for use in rank if use[0] == name)
    return f"{size_bytes / GIB:.2f}" if size_bytes else ""


def read_samples(path: Path) -> list[Sample]:
    """What memory.jsonl says, by step; lines that are not whole are passed over, as are those with
    another number of ranks than the last one: a run may have gone on with more or fewer.
    """
    found = []
    for line in read_metrics(path):
        try:
            ranks = [{name: int(size) for name, size in rank.items()} for rank in line["ranks"]]
        except (KeyError, TypeError, AttributeError, ValueError):
            continue
        found.append((int(line["step"]), ranks))
    return [sample for sample in found if _names(sample) == _names(found[-1])]


def _names(sample: Sample) -> list[list[str]]:
    """Of each rank's figures."""
    return [sorted(rank) for rank in sample[1]]
