"""The section of report.md that compares a run's plan with its measured figures.

plan.json   of a run, beside the keys that `fttrain plan` writes:
            "ran": the settings of the candidate that ran
            "since_step": the step after which it ran; earlier steps had other settings
            in that candidate "predicted" and, once the run ends, "measured": {name: figure}, named
            as in metrics.jsonl; unknown figures are left out
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fttrain.util.units import gib

FILE = "plan.json"
COMPARED = ("figure", "predicted", "measured", "difference")

_PLANNED_ROWS = re.compile(r"\bloop\.micro_batch_size=(\d+)")
# name -> label of the row, reduction over the steps, format
_FIGURES: dict[str, tuple[str, Callable[[list[float]], float], Callable[[float], str]]] = {
    "step_s": ("seconds a step, median", statistics.median, "{:.3f} s".format),
    "tokens_per_s": ("tokens/s, median", statistics.median, "{:,.0f}".format),
    "peak_device_bytes": ("peak device memory of a rank", max, gib),
    "peak_host_bytes": ("peak host memory of a rank", max, gib),
}


def read_plan(folder: Path) -> dict[str, Any] | None:
    """plan.json of the run in ``folder``; None where it is missing or not of a run."""
    try:
        plan = json.loads((folder / FILE).read_bytes())
        _ = candidate(plan)["predicted"], int(plan["since_step"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    return dict(plan)


def candidate(plan: dict[str, Any]) -> dict[str, Any]:
    """The candidate of ``plan`` that ran."""
    match: dict[str, Any] = next(c for c in plan["candidates"] if c["settings"] == plan["ran"])
    return match


def measured(lines: Sequence[Mapping[str, Any]], since_step: int) -> dict[str, float]:
    """The measured figures in ``lines`` of metrics.jsonl past ``since_step``; unknown ones are left
    out.
    """
    figures = {}
    for name, (_, reduce, _) in _FIGURES.items():
        values = [line.get(name) for line in lines if line["step"] > since_step]
        numbers = [value for value in values if isinstance(value, int | float)]
        if any(numbers):  # a CPU's device memory is the host's
            figures[name] = reduce(numbers)
    return figures


def compare(plan: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row of ``COMPARED`` for each figure that is both predicted and measured, as text.

    Where memory ran out and micro-batches became smaller than planned, the first row says so.
    """
    predicted, taken = candidate(plan)["predicted"], measured(lines, plan["since_step"])
    return _divided(plan, lines) + [
        [
            label,
            show(predicted[name]),
            show(taken[name]),
            f"{100 * (taken[name] / predicted[name] - 1):+.1f} %",
        ]
        for name, (label, _, show) in _FIGURES.items()
        if predicted.get(name) and name in taken
    ]


def _divided(plan: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    planned = _PLANNED_ROWS.search(plan["ran"])
    after = [line for line in lines if line["step"] > plan["since_step"]]
    # A line may have a held-out loss alone.
    sizes = [line["micro_batch_size"] for line in after if "micro_batch_size" in line]
    if planned is None or not sizes or sizes[-1] == int(planned[1]):
        return []
    change = f"{100 * (sizes[-1] / int(planned[1]) - 1):+.1f} %"
    return [["rows of a micro-batch, since memory ran out", planned[1], str(sizes[-1]), change]]


def plan_section(folder: Path, lines: Sequence[Mapping[str, Any]]) -> str | None:
    """The section as Markdown: predicted, measured and the difference; None without a plan or
    without measured figures.
    """
    plan = read_plan(folder)
    rows = [f"| {' | '.join(row)} |" for row in compare(plan, lines)] if plan else []
    if plan is None or not rows:
        return None
    head = ["| | predicted | measured | difference |", "|---|---|---|---|"]
    return "\n".join(
        ["## Plan and measured", "", f"`{plan['ran']}`, for {plan['rig']}", "", *head, *rows]
    )
