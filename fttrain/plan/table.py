"""A plan as people read it, and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fttrain.memory.parts import MemoryPart
from fttrain.plan.choose import Candidate, room_bytes
from fttrain.plan.cost import PART_TOKENS, DiskNeed, cost, renting
from fttrain.plan.memory import RankMemory
from fttrain.rig.profile import RigProfile
from fttrain.util.units import GIB, duration, gib

SHOWN = 24  # candidates
NOT_AT_ONCE = "of these never there at once"


def table(verdicts: Sequence[Candidate], rig: RigProfile, steps: int | None) -> Table:
    """A line a candidate, the winner first. ``steps``: of the whole run, None: not known."""
    of = f"{steps:,} steps" if steps else "1M tokens"
    title = f"{rig.name}: {_cards(rig)}; hours, kWh and $ of {of}"
    names = ("strategy", "G", "activations", "rows", "card GiB", "host GiB", "s a step", "tokens/s")
    prices = ("hours" if steps else "h / 1M", "kWh", "$")
    found = Table(*names, *prices, "limit", "fits", title=title, title_justify="left")
    for column in found.columns[3:11]:
        column.justify = "right"
    for verdict in verdicts[:SHOWN]:
        found.add_row(*_row(verdict, rig, steps), style="" if verdict.fits else "dim")
    if len(verdicts) > SHOWN:
        found.caption = f"and {len(verdicts) - SHOWN} more in plan.json"
    return found


def _cards(rig: RigProfile) -> str:
    """Each kind of card with its number."""
    names = [card.name for card in rig.cards]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _row(verdict: Candidate, rig: RigProfile, steps: int | None) -> list[str]:
    spec, time = verdict.spec, verdict.time
    kept, size = spec.placement.activations, spec.size
    resident = spec.strategy.resident_layers
    shown = list(resident) if isinstance(resident, tuple) else resident
    cards = " / ".join(f"{size_bytes / GIB:.2f}" for size_bytes in _of_cards(verdict.memory))
    taken = cost(time, rig, steps) if time else None
    return [
        spec.strategy.name + (f" {shown} resident" if resident else ""),
        str(spec.schedule.micro_batch_group) if spec.schedule.kind == "grouped" else "",
        kept if isinstance(kept, str) else ",".join(kept),
        f"{size.micro_batch_size} x {size.gradient_accumulation_steps}",
        cards or "-",
        f"{verdict.host_bytes / GIB:.2f}" if verdict.memory else "-",
        f"{time.seconds:.2f}" if time else "-",
        f"{time.tokens_per_s:.0f}" if time else "-",
        f"{taken.hours:.2f}" if taken else "-",
        f"{taken.kwh:.2f}" if taken and taken.kwh is not None else "-",
        f"{taken.price:.2f}" if taken and taken.price is not None else "-",
        time.limit if time else "-",
        "yes" if verdict.fits else _short(verdict),
    ]


def _short(verdict: Candidate) -> str:
    """Why it does not fit, in a few words; plan.json has all of them."""
    where = verdict.reason.split(":")[0]
    if not verdict.missing_bytes:
        return "no: " + where
    return f"no: {where} +{verdict.missing_bytes / GIB:.2f} GiB"


def notes(rig: RigProfile, disk: DiskNeed, steps: int | None, documents: int | None) -> list[str]:
    """What the table leaves out, a line each. ``documents``: the most of a row, None: not known."""
    found = []
    if rig.measured is None:
        found.append(
            "rates are ceilings from documents (plan.json has each one's source); those of "
            "`fttrain measure` on the machine itself are better"
        )
    if steps is None:
        found.append(
            "the run's length is not known (loop.max_steps, or a data set that is tokenised "
            "already, says it): hours, energy and price are those of a million tokens"
        )
    of_rows = (
        "one document each, every token a target: short documents and prompts that are not trained "
        "take less time, but on a GPU each further document of a row takes memory"
        if documents is None
        else f"up to {documents} document(s) each, and the data's share of targets: short "
        "documents take less time"
    )
    return [
        *found,
        f"a step has full rows, {of_rows}",
        f"disk, with every strategy: {gib(disk.total_bytes)}: frozen base {gib(disk.cache_bytes)}, "
        f"snapshots {gib(disk.snapshots_bytes)}",
        "energy: the cards at their power limit for all of that time, an upper bound",
        renting(rig),
    ]


def _of_cards(ranks: Sequence[RankMemory]) -> list[int]:
    """Bytes of each card; once where all take the same."""
    each = [rank.device_bytes for rank in ranks]
    return each[:1] if len(set(each)) == 1 else each


def parts_table(verdict: Candidate, rig: RigProfile) -> Table:
    """Where ``verdict``'s memory goes, a column a card, the largest parts first."""
    ranks = verdict.memory
    names = [f"card {rank.rank}" for rank in ranks]
    found = Table("GiB", *names, "host", title=verdict.settings, title_justify="left")
    for column in found.columns[1:]:
        column.justify = "right"
    on_cards = {part: max(r.device.get(part, 0) for r in ranks) for r in ranks for part in r.device}
    for part in sorted(on_cards, key=lambda part: -on_cards[part]):
        # Kernels may take less than what of the reserved parts is not there while they run.
        name = part.label if on_cards[part] >= 0 else NOT_AT_ONCE
        found.add_row(name, *(f"{rank.device.get(part, 0) / GIB:.2f}" for rank in ranks), "")
    own = {part: sum(r.host.get(part, 0) for r in ranks) for r in ranks for part in r.host}
    for part, size_bytes in sorted({**own, **ranks[0].shared}.items(), key=lambda item: -item[1]):
        found.add_row(part.label, *("" for _ in ranks), f"{size_bytes / GIB:.2f}")
    overheads = [f"{(card.overhead_bytes or 0) / GIB:.2f}" for card in rig.cards]
    known = "measured" if rig.measured else "an allowance"
    found.add_row(f"context, communication ({known})", *overheads, "")
    on_cpu = rig.cards[0].kind == "cpu"
    if not on_cpu:
        held = [card.allocator_bytes for card in rig.cards]
        shown = ("not measured" if size is None else f"{size / GIB:.2f}" for size in held)
        found.add_row("allocator's rounding, libraries' workspaces", *shown, "")
        if any(card.others_bytes for card in rig.cards):
            others = (f"{(card.others_bytes or 0) / GIB:.2f}" for card in rig.cards)
            found.add_row("other programs, as measured", *others, "")
    sums = [
        f"{(rank.device_bytes + card.beside_bytes) / GIB:.2f}"
        for rank, card in zip(ranks, rig.cards, strict=True)
    ]
    found.add_section()
    # What ranks of a CPU take is the host's, all of it.
    on_host = verdict.host_bytes + sum(card.beside_bytes for card in rig.cards if on_cpu)
    found.add_row("together", *sums, f"{on_host / GIB:.2f}")
    there = ["" if on_cpu else f"{card.memory_bytes / GIB:.2f}" for card in rig.cards]
    found.add_row("there is", *there, f"{rig.host.memory_bytes / GIB:.2f}")
    return found


def summary(verdict: Candidate, rig: RigProfile, steps: int | None) -> str:
    """The winner in one line."""
    assert verdict.time is not None
    card = max(rank.device_bytes for rank in verdict.memory)
    taken = cost(verdict.time, rig, steps)
    whole = f", {duration(taken.hours * 3600)} for {steps:,} steps" if steps else ""
    price = f", ${taken.price:,.2f} to rent" if steps and taken.price is not None else ""
    return (
        f"{verdict.settings}: {gib(card)} on the fullest card (run in full on fake tensors), "
        f"{gib(verdict.host_bytes)} of host memory, {verdict.time.seconds:.2f} s a step, "
        f"{verdict.time.tokens_per_s:.0f} tokens/s{whole}{price}"
    )


def as_json(
    verdicts: Sequence[Candidate], rig: RigProfile, model: str, disk: DiskNeed, steps: int | None
) -> dict[str, Any]:
    """All of it. Bytes, seconds, hours, kWh and US dollars; those of a candidate are of ``steps``,
    or where that is None of ``part_tokens``.
    """
    return {
        "model": model,
        "rig": rig.name,
        "room_bytes": [room_bytes(card) for card in rig.cards],
        "host_memory_bytes": rig.host.memory_bytes,
        "sources": rig.sources,
        "disk": {"cache_bytes": disk.cache_bytes, "snapshots_bytes": disk.snapshots_bytes},
        "steps": steps,
        "part_tokens": None if steps else PART_TOKENS,
        "renting": renting(rig),
        "candidates": [_candidate(verdict, rig, steps) for verdict in verdicts],
    }


def _by_label(parts: Mapping[MemoryPart, int]) -> dict[str, int]:
    return {part.label: size_bytes for part, size_bytes in parts.items()}


def _candidate(verdict: Candidate, rig: RigProfile, steps: int | None) -> dict[str, Any]:
    time = verdict.time
    taken = cost(time, rig, steps) if time else None
    return {
        "settings": verdict.settings,
        "fits": verdict.fits,
        "reason": verdict.reason,
        "confirmed": verdict.confirmed,
        "step_s": time.seconds if time else None,
        "tokens_per_s": time.tokens_per_s if time else None,
        "limit": time.limit if time else None,
        "hours": taken.hours if taken else None,
        "kwh": taken.kwh if taken else None,
        "price": taken.price if taken else None,
        "host_bytes": verdict.host_bytes,
        "ranks": [
            {
                "rank": rank.rank,
                "layers": rank.layers,
                "device_bytes": _by_label(rank.device),
                "host_bytes": _by_label(rank.host),
                "shared_bytes": _by_label(rank.shared),
            }
            for rank in verdict.memory
        ],
    }
