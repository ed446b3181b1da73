"""The section of report.md on the memory of a run's ranks.

memory.json   {"step", "ranks": [[{"part", "device_bytes", "host_bytes"}, ...], ...]}, by rank
memory.jsonl  a line every ``track.memory_every`` steps: {"step", "ranks": [{name: bytes}, ...]}, by
              rank; names as in ``fttrain.memory.sampling.sample``, on CPUs without the device's;
              on GPUs also "cards": [{name: figure}, ...], names as in ``fttrain.rig.telemetry``
"""

import json
from pathlib import Path

from fttrain.track.metrics import read_metrics
from fttrain.util.units import GIB

Sample = tuple[int, list[dict[str, int]]]  # step; each rank's figures, in bytes
CardSample = tuple[int, list[dict[str, float]]]  # step; the figures of each rank's card


def memory_section(path: Path) -> str | None:
    """The section as Markdown, from memory.json; None where the file is missing or damaged."""
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
    heads = [f"rank {rank}, {side}" for rank in range(len(ranks)) for side in ("device", "host")]
    lines = [
        f"## Memory in step {step}, GiB",
        "",
        f"| part | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for name in names:
        cells = [_cell(rank, name, column) for rank in ranks for column in (1, 2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rank: list[tuple[str, int, int]], name: str, column: int) -> str:
    size_bytes = sum(int(use[column]) for use in rank if use[0] == name)
    return f"{size_bytes / GIB:.2f}" if size_bytes else ""


def read_samples(path: Path) -> list[Sample]:
    """The samples of memory.jsonl, by step.

    Damaged lines are skipped. So are lines with other figures or ranks than the last one: a resumed
    run may have more or fewer ranks.
    """
    samples = []
    for line in read_metrics(path):
        try:
            ranks = [{name: int(size) for name, size in rank.items()} for rank in line["ranks"]]
        except (KeyError, TypeError, AttributeError, ValueError):
            continue
        samples.append((int(line["step"]), ranks))
    return [sample for sample in samples if _names(sample) == _names(samples[-1])]


def _names(sample: Sample) -> list[list[str]]:
    """The names of each rank's figures."""
    return [sorted(rank) for rank in sample[1]]
