"""The plot of sweep.md: what is minimised by each setting that differs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fttrain.sweep.record import Record, keys_of, value_of
from fttrain.track.plots import save

SIZE = (5.0, 3.6)  # inches of a panel
COLUMNS = 3
DECADES = 30.0  # largest over smallest from which an axis is logarithmic


def plot_parameters(path: Path, done: Sequence[Record], label: str) -> bool:
    """A panel for each setting with two values or more; False where there is none.

    ``done``: trials with a value, the best first. Numbers are placed by size, anything else side by
    side; the line joins the best trial of each value.
    """
    panels = {key: _values(done, key) for key in keys_of(done)}
    panels = {key: values for key, values in panels.items() if len(set(values)) > 1}
    if not panels:
        return False
    from matplotlib.figure import Figure  # heavy, and not every command draws

    rows = math.ceil(len(panels) / COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for one, (key, values) in zip(axes, panels.items(), strict=False):
        _draw(one, values, [record.value or 0.0 for record in done])
        one.set_xlabel(key)
        one.set_ylabel(label)
        one.grid(alpha=0.3)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    save(figure, path)
    return True


def _values(done: Sequence[Record], key: str) -> list[str]:
    """Of each trial; empty where it was not told one."""
    own = [{text.partition("=")[0]: value_of(text) for text in r.overrides} for r in done]
    return [values.get(key, "") for values in own]


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        found = [float(value) for value in values]
    except ValueError:
        return None
    return found if all(math.isfinite(value) for value in found) else None


def _draw(axes: Any, values: Sequence[str], results: Sequence[float]) -> None:
    places = _numbers(values)
    if places is None:
        names = sorted(set(values))
        places = [float(names.index(value)) for value in values]
        axes.set_xticks(range(len(names)), names, rotation=20)
        axes.margins(x=0.2)
    elif min(places) > 0 and max(places) / min(places) >= DECADES:
        axes.set_xscale("log")
    best: dict[float, float] = {}
    for place, result in zip(places, results, strict=True):
        best[place] = min(result, best.get(place, math.inf))
    line = sorted(best.items())
    axes.plot([x for x, _ in line], [y for _, y in line], color="tab:blue", alpha=0.5)
    axes.scatter(places, results, color="tab:blue", zorder=3)
    axes.scatter(places[:1], results[:1], color="tab:orange", zorder=4, label="the best")
    axes.legend(fontsize="small")
