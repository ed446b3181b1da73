"""A plan as people read it, and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fttrain.plan.choose import Verdict, room_bytes
from fttrain.plan.memory import RankMemory
from fttrain.rig.profile import RigProfile
from fttrain.units import GIB, duration, gib

SHOWN = 24  # candidates


def table(verdicts: Sequence[Verdict], rig: RigProfile, steps: int | None) -> Table:
    """A line a candidate, the winner first. ``steps``: of the whole run, None: not known."""
    title = f"{rig.name}: {len(rig.cards)} x {rig.cards[0].name}"
    names = ("strategy", "G", "activations", "rows", "card GiB", "host GiB", "s a step", "tokens/s")
    found = Table(*names, "hours", "limit", "fits", title=title, title_justify="left")
    for column in found.columns[3:9]:
        column.justify = "right"
    for verdict in verdicts[:SHOWN]:
        found.add_row(*_row(verdict, steps), style="" if verdict.fits else "dim")
    if len(verdicts) > SHOWN:
        found.caption = f"and {len(verdicts) - SHOWN} more in plan.json"
    return found


def _row(verdict: Verdict, steps: int | None) -> list[str]:
    recipe, time = verdict.recipe, verdict.time
    kept, size = recipe.placement.activations, recipe.size
    resident = recipe.strategy.resident_layers
    cards = " / ".join(f"{rank.device_bytes / GIB:.2f}" for rank in _different(verdict.memory))
    return [
        recipe.strategy.name + (f" {resident} resident" if resident else ""),
        str(recipe.schedule.group) if recipe.schedule.kind == "grouped" else "",
        kept if isinstance(kept, str) else ",".join(kept),
        f"{size.micro_batch_size} x {size.gradient_accumulation_steps}",
        cards or "-",
        f"{verdict.host_bytes / GIB:.2f}" if verdict.memory else "-",
        f"{time.seconds:.2f}" if time else "-",
        f"{time.tokens_per_s:.0f}" if time else "-",
        f"{time.seconds * steps / 3600:.1f}" if time and steps else "-",
        time.limit if time else "-",
        "yes" if verdict.fits else _short(verdict),
    ]


def _short(verdict: Verdict) -> str:
    """Why it does not fit, in a few words; plan.json has all of them."""
    if not verdict.missing_bytes:
        return "no: " + verdict.reason.split(":")[0]
    where = verdict.reason.split(":")[0]
    return f"no: {where}, {verdict.missing_bytes / GIB:.2f} GiB short"


def _different(ranks: Sequence[RankMemory]) -> list[RankMemory]:
    """One rank of those that take the same."""
    return list({rank.device_bytes: rank for rank in ranks}.values())


def parts_table(verdict: Verdict, rig: RigProfile) -> Table:
    """Where ``verdict``'s memory goes, a column a card, the largest parts first."""
    ranks = verdict.memory
    names = [f"card {rank.rank}" for rank in ranks]
    found = Table("GiB", *names, "host", title=verdict.settings, title_justify="left")
    for column in found.columns[1:]:
        column.justify = "right"
    on_cards = {part: max(r.device.get(part, 0) for r in ranks) for r in ranks for part in r.device}
    for part in sorted(on_cards, key=lambda part: -on_cards[part]):
        found.add_row(part, *(f"{rank.device.get(part, 0) / GIB:.2f}" for rank in ranks), "")
    own = {part: sum(r.host.get(part, 0) for r in ranks) for r in ranks for part in r.host}
    for part, size_bytes in sorted({**own, **ranks[0].shared}.items(), key=lambda item: -item[1]):
        found.add_row(part, *("" for _ in ranks), f"{size_bytes / GIB:.2f}")
    overheads = [f"{(card.overhead_bytes or 0) / GIB:.2f}" for card in rig.cards]
    found.add_row("context, communication", *overheads, "")
    sums = [
        f"{(rank.device_bytes + (card.overhead_bytes or 0)) / GIB:.2f}"
        for rank, card in zip(ranks, rig.cards, strict=True)
    ]
    found.add_section()
    found.add_row("together", *sums, f"{verdict.host_bytes / GIB:.2f}")
    there = [f"{card.memory_bytes / GIB:.2f}" for card in rig.cards]
    found.add_row("there is", *there, f"{rig.host.memory_bytes / GIB:.2f}")
    return found


def summary(verdict: Verdict, steps: int | None) -> str:
    """The winner in one line."""
    assert verdict.time is not None
    card = max(rank.device_bytes for rank in verdict.memory)
    whole = f", {duration(verdict.time.seconds * steps)} for {steps} steps" if steps else ""
    return (
        f"{verdict.settings}: {gib(card)} on the fullest card, {gib(verdict.host_bytes)} of host "
        f"memory, {verdict.time.seconds:.2f} s a step, {verdict.time.tokens_per_s:.0f} tokens/s"
        f"{whole}"
    )


def as_json(verdicts: Sequence[Verdict], rig: RigProfile, model: str) -> dict[str, Any]:
    """All of it. Bytes and seconds."""
    return {
        "model": model,
        "rig": rig.name,
        "room_bytes": [room_bytes(card) for card in rig.cards],
        "host_memory_bytes": rig.host.memory_bytes,
        "sources": rig.sources,
        "candidates": [_candidate(verdict) for verdict in verdicts],
    }


def _candidate(verdict: Verdict) -> dict[str, Any]:
    time = verdict.time
    return {
        "settings": verdict.settings,
        "fits": verdict.fits,
        "reason": verdict.reason,
        "step_s": time.seconds if time else None,
        "tokens_per_s": time.tokens_per_s if time else None,
        "limit": time.limit if time else None,
        "host_bytes": verdict.host_bytes,
        "ranks": [
            {
                "rank": rank.rank,
                "layers": rank.layers,
                "device_bytes": rank.device,
                "host_bytes": rank.host,
                "shared_bytes": rank.shared,
            }
            for rank in verdict.memory
        ],
    }
