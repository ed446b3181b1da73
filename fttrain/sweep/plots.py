"""The plot of sweep.md: the objective over each setting that differs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fttrain.sweep.record import Record, keys_of, value_of
from fttrain.track.plots import save

SIZE = (5.0, 3.6)  # inches of a panel
COLUMNS = 3
DECADES = 30.0  # ratio of largest to smallest value from which an axis is logarithmic


def plot_parameters(path: Path, done: Sequence[Record], label: str) -> bool:
    """Plot a panel for each setting with two values or more. False where there is none.

    ``done``: trials with a value, the best first. Numbers have a numeric axis, other values stand
    side by side. A line joins the best trial of each value.
    """
    panels = {key: _values(done, key) for key in keys_of(done)}
    panels = {key: values for key, values in panels.items() if len(set(values)) > 1}
    if not panels:
        return False
    from matplotlib.figure import Figure  # heavy, and few commands plot

    rows = math.ceil(len(panels) / COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (key, values) in zip(axes, panels.items(), strict=False):
        _draw(panel, values, [record.value or 0.0 for record in done])
        panel.set_xlabel(key)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    save(figure, path)
    return True


def _values(done: Sequence[Record], key: str) -> list[str]:
    """The value of ``key`` in each trial; empty where the trial has none."""
    settings = [{text.partition("=")[0]: value_of(text) for text in r.overrides} for r in done]
    return [values.get(key, "") for values in settings]


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(math.isfinite(number) for number in numbers) else None


def _draw(axes: Any, values: Sequence[str], results: Sequence[float]) -> None:
    positions = _numbers(values)
    if positions is None:
        names = sorted(set(values))
        positions = [float(names.index(value)) for value in values]
        axes.set_xticks(range(len(names)), names, rotation=20)
        axes.margins(x=0.2)
    elif min(positions) > 0 and max(positions) / min(positions) >= DECADES:
        axes.set_xscale("log")
    best: dict[float, float] = {}
    for position, result in zip(positions, results, strict=True):
        best[position] = min(result, best.get(position, math.inf))
    line = sorted(best.items())
    axes.plot([x for x, _ in line], [y for _, y in line], color="tab:blue", alpha=0.5)
    axes.scatter(positions, results, color="tab:blue", zorder=3)
    axes.scatter(positions[:1], results[:1], color="tab:orange", zorder=4, label="the best")
    axes.legend(fontsize="small")
