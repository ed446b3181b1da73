"""The memory of a run's ranks, as report.md shows it.

memory.json   {"step", "ranks": [[{"part", "device_bytes", "host_bytes"}, ...], ...]}, by rank
"""

import json
from pathlib import Path

from fttrain.units import GIB


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
