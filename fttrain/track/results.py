"""The results of a run beside the figures of its steps, read from its files."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fttrain.track import plan
from fttrain.track.base import Results, Table
from fttrain.track.metrics import read_metrics

SMOOTHING = 0.1  # weight of the newest value in a smoothed one
SAMPLE = ("prompt", "reference", "before", "after")
PLANNED = ("settings", "fits", "step_s", "tokens_per_s", "hours", "kwh", "price", "reason")
PEAKS = ("peak_device_bytes", "peak_host_bytes")


def read_results(folder: Path, step: int, tables: Mapping[str, Table] | None = None) -> Results:
    """The results of the run in ``folder`` after ``step``: answers, plan, plots and figures.

    ``tables``: further tables, by name. Missing and damaged parts are left out.
    """
    evaluation = read_evaluation(folder / "evaluation.json")
    lines = read_metrics(folder / "metrics.jsonl")
    points = {at: value for at, value in held_out(lines, evaluation) if at <= step}
    all_tables = {"samples": _samples(evaluation), **_plan(folder, lines), **(tables or {})}
    plots = sorted((folder / "plots").glob("*.png"))
    return Results(
        holdout_nll=points.get(step),
        tables={name: table for name, table in all_tables.items() if table.rows},
        summary=_summary(lines, list(points.values())),
        plots={path.stem: path for path in plots},
    )


def read_evaluation(path: Path) -> dict[str, Any]:
    """The content of evaluation.json; {} where it is missing or damaged."""
    try:
        evaluation = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return evaluation if isinstance(evaluation, dict) else {}


def holdout_nll(evaluation: Mapping[str, Any], name: str) -> float | None:
    """Held-out loss of the ``base`` or the ``tuned`` model, in nats per token."""
    value = (evaluation.get(name) or {}).get("nll")
    return float(value) if isinstance(value, int | float) else None


def series(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """The (step, value of ``key``) pairs of ``lines`` where both are numbers."""
    pairs = [(line.get("step"), line.get(key)) for line in lines if isinstance(line, dict)]
    return [
        (step, value)
        for step, value in pairs
        if isinstance(step, int) and isinstance(value, int | float)
    ]


def smoothed(values: Iterable[float]) -> list[float]:
    """The exponential mean after each value; a plain mean at first, to start without lag."""
    mean, result = 0.0, []
    for count, value in enumerate(values, 1):
        mean += max(1 / count, SMOOTHING) * (value - mean)
        result.append(mean)
    return result


def held_out(
    lines: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]
) -> list[tuple[int, float]]:
    """The (step, held-out loss) pairs: the base at step 0, then all measured during the run.

    The last pair is the end of the run. "tuned" is not used: it has no step and may be older.
    """
    points = dict(series(lines, "holdout_nll"))
    points.update(series(evaluation.get("history") or [], "nll"))
    base = holdout_nll(evaluation, "base")
    if base is not None:
        points.setdefault(0, base)
    return sorted(points.items())


def _samples(evaluation: Mapping[str, Any]) -> Table:
    samples = [sample for sample in evaluation.get("samples") or [] if isinstance(sample, dict)]
    return Table(SAMPLE, [[str(sample.get(key) or "") for key in SAMPLE] for sample in samples])


def _plan(folder: Path, lines: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """Tables of the candidates in plan.json and of the one that ran, predicted and measured."""
    content = plan.read_plan(folder)
    if content is None:
        return {}
    candidates = [[each.get(key) for key in PLANNED] for each in content["candidates"]]
    known = [number for number, _ in enumerate(PLANNED) if any(row[number] for row in candidates)]
    return {
        "plan": Table(
            [PLANNED[number] for number in known],
            [[row[number] for number in known] for row in candidates],
        ),
        "plan_and_measured": Table(plan.COMPARED, plan.compare(content, lines)),
    }


def figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians and peaks over all steps so far, by name; figures that no step has are left out."""
    result: dict[str, float] = {}
    for name in ("tokens_per_s", "step_s"):
        values = [value for _, value in series(lines, name)]
        if values:
            result[f"{name}_median"] = statistics.median(values)
    for name in PEAKS:
        peak = max((value for _, value in series(lines, name)), default=0)
        if peak:
            result[f"{name}_max"] = peak
    return result


def _summary(lines: Sequence[Mapping[str, Any]], held_out_nll: Sequence[float]) -> dict[str, float]:
    """The figures to compare runs by; none before the first step. ``held_out_nll``: by step, the
    base first.
    """
    result = figures(lines)
    if lines and held_out_nll:
        result["holdout_nll_base"] = held_out_nll[0]
        result["holdout_nll_best"] = min(held_out_nll)
        result["holdout_nll_last"] = held_out_nll[-1]
    return result
