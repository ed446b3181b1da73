"""How the cards fared, as report.md shows it: "cards" of memory.jsonl (see track/memory.py)."""

from pathlib import Path

from fttrain.track.memory import CardSample
from fttrain.track.metrics import read_metrics
from fttrain.track.plots import CARD_PANELS, plot_cards

PLOT = "cards.png"


def read_cards(path: Path) -> list[CardSample]:
    """What memory.jsonl says of cards, by step; lines without any are passed over, as are those
    with another number of them than the last one.
    """
    found: list[CardSample] = []
    for line in read_metrics(path):
        try:
            cards = [{k: float(v) for k, v in card.items()} for card in line["cards"]]
        except (KeyError, TypeError, AttributeError, ValueError):
            continue
        if any(name in card for card in cards for name in CARD_PANELS):
            found.append((int(line["step"]), cards))
    return [sample for sample in found if len(sample[1]) == len(found[-1][1])]


def cards_section(path: Path, plots: Path) -> list[str]:
    """Markdown of memory.jsonl, its plot in the folder ``plots``; [] of a run without cards."""
    samples = read_cards(path)
    if not samples:
        return []
    plot_cards(plots / PLOT, samples)
    lines = [_told(rank, samples) for rank in range(len(samples[-1][1]))]
    listed = "\n".join(f"- {line}" for line in lines)
    return [f"## Cards over the steps\n\n![cards](plots/{PLOT})\n\n{listed}"]


def _told(rank: int, samples: list[CardSample]) -> str:
    own = [cards[rank] for _, cards in samples]
    told = []
    for name, unit in (("power_w", "W"), ("temperature_c", "°C")):
        values = [card[name] for card in own if name in card]
        if values:
            told.append(f"at most {max(values):.0f} {unit}")
    throttled = sum(bool(card.get("throttled")) for card in own)
    if throttled:
        told.append(f"throttled in {throttled} of {len(own)} samples")
    return f"rank {rank}: {', '.join(told)}"
