"""The results of a sweep so far: sweep.json, sweep.md with its plots, and the best trial as an
experiment.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fttrain.sweep.best import FILE as BEST
from fttrain.sweep.best import write_best
from fttrain.sweep.config import Sweep
from fttrain.sweep.objective import OBJECTIVES
from fttrain.sweep.plots import plot_parameters
from fttrain.sweep.record import Record, keys_of, records, value_of
from fttrain.track import read_metrics
from fttrain.track.results import figures
from fttrain.util.atomic_files import write_text
from fttrain.util.units import duration, gib

ORDER = ("done", "pruned", "running", "interrupted", "failed")
PLOT = "parameters.png"


@dataclass(frozen=True)
class Row:
    """One trial with its figures."""

    record: Record
    holdout_nll: float | None  # nats per token, of the tuned model
    tokens_per_s: float | None  # median
    peak_bytes: float | None  # of a rank: device memory with a card, else host memory


def write_results(sweep: Sweep, trial_count: int | None = None) -> list[Row]:
    """Rewrite all results from the trials' folders; return the trials, the best first.

    ``trial_count``: trials of the whole search, where it is known.
    """
    rows = sorted((_row(sweep.folder, record) for record in records(sweep.folder)), key=_order)
    (sweep.folder / "plots").mkdir(exist_ok=True)
    write_text(sweep.folder / "sweep.json", json.dumps(_as_json(sweep, rows), indent=1) + "\n")
    done = [row.record for row in rows if row.record.state == "done"]
    label = OBJECTIVES[sweep.config.objective].label
    plotted = plot_parameters(sweep.folder / "plots" / PLOT, done, label)
    if done:
        write_best(sweep, done[0])
    write_text(sweep.folder / "sweep.md", _page(sweep, rows, trial_count, plotted))
    return rows


def _order(row: Row) -> tuple[int, float]:
    value = row.record.value
    return ORDER.index(row.record.state), math.inf if value is None else value


def _row(folder: Path, record: Record) -> Row:
    known = figures(read_metrics(folder / record.name / "metrics.jsonl"))
    return Row(
        record,
        OBJECTIVES["holdout_nll"].measure(folder / record.name),
        known.get("tokens_per_s_median"),
        known.get("peak_device_bytes_max", known.get("peak_host_bytes_max")),
    )


def _as_json(sweep: Sweep, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "objective": sweep.config.objective,
        "fixed": list(sweep.fixed),
        "trials": [
            {
                "name": row.record.name,
                "overrides": {
                    text.partition("=")[0]: value_of(text) for text in row.record.overrides
                },
                "state": row.record.state,
                "value": row.record.value,
                "reason": row.record.reason,
                "exit_code": row.record.exit_code,
                "holdout_nll": row.holdout_nll,
                "tokens_per_s": row.tokens_per_s,
                "peak_bytes": row.peak_bytes,
                "seconds": row.record.seconds,
                "spans": row.record.spans,
            }
            for row in rows
        ],
    }


def _page(sweep: Sweep, rows: Sequence[Row], trial_count: int | None, plotted: bool) -> str:
    records = [row.record for row in rows]
    parts = [f"# {sweep.folder.name}", summary(rows, trial_count)]
    label = OBJECTIVES[sweep.config.objective].label
    shown = [] if sweep.config.objective == "holdout_nll" else [label]
    keys = keys_of(records)
    head = [*keys, *shown, OBJECTIVES["holdout_nll"].label, "tokens/s", "peak memory", "hours"]
    lines = [_line([*head, "state"]), _line(["---"] * (len(head) + 1))]
    lines += [_line(_cells(row, keys, bool(shown))) for row in rows]
    parts.append("\n".join(lines))
    if sweep.fixed:
        parts.append("All trials: `" + " ".join(sweep.fixed).replace("`", "'") + "`")
    if plotted:
        parts.append(f"## By setting\n\n![{label} by setting](plots/{PLOT})")
    if any(row.record.state == "done" for row in rows):
        best = sweep.folder / BEST
        parts.append(
            f"## The best again\n\n`{BEST}` has its settings:\n\n"
            f"```\nfttrain train experiment={best}\n```"
        )
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Row], trial_count: int | None = None) -> str:
    """The number of trials in each state, and the best trial, in one line."""
    states = [row.record.state for row in rows]
    counts = [f"{states.count(state)} {state}" for state in ORDER if state in states]
    of = "" if trial_count is None else f" of {trial_count}"
    best = next((row.record for row in rows if row.record.state == "done"), None)
    text = f"{len(rows)}{of} trials: {', '.join(counts) or 'none yet'}"
    return text if best is None else f"{text}; the best is {best.name} with {best.value:.4f}"


def _cells(row: Row, keys: Sequence[str], with_value: bool) -> list[str]:
    record = row.record
    settings = {text.partition("=")[0]: value_of(text) for text in record.overrides}
    state = record.state + (f": {record.reason}" if record.reason else "")
    value = "" if record.value is None else f"{record.value:.4f}"
    return [
        *(settings.get(key, "") for key in keys),
        *([value] if with_value else []),
        "" if row.holdout_nll is None else f"{row.holdout_nll:.4f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        "" if row.peak_bytes is None else gib(row.peak_bytes),
        f"{record.seconds / 3600:.2f}" if record.seconds >= 36 else duration(record.seconds),
        state,
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
