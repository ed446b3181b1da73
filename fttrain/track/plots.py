"""The plots of report.md."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fttrain.track.memory import CardSample, Sample
from fttrain.track.results import smoothed
from fttrain.util.atomic_files import replace_unsynced
from fttrain.util.units import GIB

SIZE = (8.0, 4.5)  # inches, of one panel
DEVICE_LINES = {  # figure of a rank -> (label, line style)
    "device_peak_bytes": ("peak of the allocator", "-"),
    "device_used_bytes": ("card, all programs", ":"),
}
CARD_PANELS = {"power_w": "power, W", "temperature_c": "temperature, °C"}
HOST_LINES = {
    "host_resident_bytes": ("resident", "-"),
    "host_free_bytes": ("still free on its machine", ":"),
}


def plot_loss(
    path: Path, losses: list[tuple[int, float]], heldout: list[tuple[int, float]]
) -> None:
    """Plot the training and the held-out loss, (step, nats per token); either may be empty."""
    figure, (axes,) = _panels("nats per token")
    if losses:
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
        axes.plot(steps, smoothed(values), color="tab:blue", linewidth=2, label="smoothed")
    if heldout:
        steps, values = zip(*heldout, strict=True)
        axes.plot(steps, values, "o--", color="tab:orange", label="held-out loss")
    axes.legend()
    save(figure, path)


def plot_rate(path: Path, rates: list[tuple[int, float]]) -> None:
    """Plot the throughput; ``rates``: (step, tokens per second), at least one."""
    figure, (axes,) = _panels("tokens per second, all ranks")
    steps, values = zip(*rates, strict=True)
    median = statistics.median(values)
    axes.plot(steps, values, color="tab:green", linewidth=1)
    axes.axhline(median, color="black", linestyle="--", label=f"median {median:,.0f}")
    axes.set_ylim(bottom=0)
    axes.legend()
    save(figure, path)


def plot_memory(path: Path, samples: Sequence[Sample]) -> None:
    """Plot the memory of each rank: a panel for the host and, with cards, one above it for the
    device, with the card's size as a line. ``samples``: at least one, all of equally many ranks.
    """
    last = samples[-1][1]
    sizes = {rank["device_total_bytes"] for rank in last if "device_total_bytes" in rank}
    labels = ["device memory, GiB", "host memory, GiB"] if sizes else ["host memory, GiB"]
    figure, panels = _panels(*labels)
    _draw_memory(panels[-1], samples, HOST_LINES)
    if sizes:
        _draw_memory(panels[0], samples, DEVICE_LINES)
    for size_bytes in sizes:
        panels[0].axhline(size_bytes / GIB, color="black", linestyle="--", label="size of a card")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    save(figure, path)


def plot_cards(path: Path, samples: Sequence[CardSample]) -> None:
    """Plot the cards: a panel for each figure, a line for each card, crosses where it throttled.

    ``samples``: at least one, all of equally many cards.
    """
    figure, panels = _panels(*CARD_PANELS.values())
    steps = [step for step, _ in samples]
    for axes, name in zip(panels, CARD_PANELS, strict=True):
        for rank in range(len(samples[-1][1])):
            values = [cards[rank].get(name, math.nan) for _, cards in samples]
            axes.plot(steps, values, marker=".", color=f"C{rank}", label=f"rank {rank}")
            hot = [i for i, (_, cards) in enumerate(samples) if cards[rank].get("throttled")]
            if hot:
                hot_steps, values = [steps[i] for i in hot], [values[i] for i in hot]
                axes.plot(hot_steps, values, "x", color="black", label=f"rank {rank} throttled")
        axes.legend(fontsize="small")
    save(figure, path)


def _draw_memory(
    axes: Any, samples: Sequence[Sample], lines: Mapping[str, tuple[str, str]]
) -> None:
    """Draw ``lines`` of each rank, one colour for each rank."""
    steps = [step for step, _ in samples]
    for rank, names in enumerate(samples[-1][1]):
        for name, (label, style) in lines.items():
            if name in names:
                values = [ranks[rank][name] / GIB for _, ranks in samples]
                text = f"rank {rank}: {label}"
                axes.plot(steps, values, style, marker=".", color=f"C{rank}", label=text)


def _panels(*labels: str) -> tuple[Any, list[Any]]:
    """A figure with a panel for each y-axis label, one above the other, over the steps.

    The figure needs no display and is apart from pyplot's global state.
    """
    from matplotlib.figure import Figure  # heavy, and many training runs never plot

    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(labels)), layout="constrained")
    panels = figure.subplots(len(labels), squeeze=False, sharex=True)[:, 0]
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    return figure, list(panels)


def save(figure: Any, path: Path) -> None:
    """Save ``figure`` as a PNG, with one atomic replace."""
    replace_unsynced(path, lambda part: figure.savefig(part, dpi=120, format="png"))
