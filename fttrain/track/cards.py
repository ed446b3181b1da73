"""The section of report.md on the cards: "cards" of memory.jsonl (see track/memory.py)."""

from pathlib import Path

from fttrain.track.memory import CardSample
from fttrain.track.metrics import read_metrics
from fttrain.track.plots import CARD_PANELS, plot_cards

PLOT = "cards.png"


def read_cards(path: Path) -> list[CardSample]:
    """The samples of cards in memory.jsonl, by step. Lines without cards are skipped, and so are
    lines with another number of cards than the last one has.
    """
    samples: list[CardSample] = []
    for line in read_metrics(path):
        try:
            cards = [{k: float(v) for k, v in card.items()} for card in line["cards"]]
        except (KeyError, TypeError, AttributeError, ValueError):
            continue
        if any(name in card for card in cards for name in CARD_PANELS):
            samples.append((int(line["step"]), cards))
    return [sample for sample in samples if len(sample[1]) == len(samples[-1][1])]


def cards_section(path: Path, plots: Path) -> list[str]:
    """The section as Markdown, its plot in the folder ``plots``; [] for a run without cards."""
    samples = read_cards(path)
    if not samples:
        return []
    plot_cards(plots / PLOT, samples)
    lines = [_rank_line(rank, samples) for rank in range(len(samples[-1][1]))]
    listed = "\n".join(f"- {line}" for line in lines)
    return [f"## Cards over the steps\n\n![cards](plots/{PLOT})\n\n{listed}"]


def _rank_line(rank: int, samples: list[CardSample]) -> str:
    figures = [cards[rank] for _, cards in samples]
    parts = []
    for name, unit in (("power_w", "W"), ("temperature_c", "°C")):
        values = [card[name] for card in figures if name in card]
        if values:
            parts.append(f"at most {max(values):.0f} {unit}")
    throttled = sum(bool(card.get("throttled")) for card in figures)
    if throttled:
        parts.append(f"throttled in {throttled} of {len(figures)} samples")
    return f"rank {rank}: {', '.join(parts)}"
