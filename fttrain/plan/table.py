"""A plan as tables and text, and as JSON."""

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


def table(candidates: Sequence[Candidate], rig: RigProfile, steps: int | None) -> Table:
    """A row for each candidate, the winner first. ``steps``: of the whole run, None: not known."""
    length = f"{steps:,} steps" if steps else "1M tokens"
    title = f"{rig.name}: {_cards(rig)}; hours, kWh and $ of {length}"
    names = ("strategy", "G", "activations", "rows", "card GiB", "host GiB", "s a step", "tokens/s")
    prices = ("hours" if steps else "h / 1M", "kWh", "$")
    table = Table(*names, *prices, "limit", "fits", title=title, title_justify="left")
    for column in table.columns[3:11]:
        column.justify = "right"
    for candidate in candidates[:SHOWN]:
        table.add_row(*_row(candidate, rig, steps), style="" if candidate.fits else "dim")
    if len(candidates) > SHOWN:
        table.caption = f"and {len(candidates) - SHOWN} more in plan.json"
    return table


def _cards(rig: RigProfile) -> str:
    """Each kind of card with its count."""
    names = [card.name for card in rig.cards]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _row(candidate: Candidate, rig: RigProfile, steps: int | None) -> list[str]:
    spec, time = candidate.spec, candidate.time
    policies, size = spec.placement.activations, spec.size
    resident = spec.strategy.resident_layers
    layers = list(resident) if isinstance(resident, tuple) else resident
    cards = " / ".join(f"{size_bytes / GIB:.2f}" for size_bytes in _of_cards(candidate.memory))
    total = cost(time, rig, steps) if time else None
    return [
        spec.strategy.name + (f" {layers} resident" if resident else ""),
        str(spec.schedule.micro_batch_group) if spec.schedule.kind == "grouped" else "",
        policies if isinstance(policies, str) else ",".join(policies),
        f"{size.micro_batch_size} x {size.gradient_accumulation_steps}",
        cards or "-",
        f"{candidate.host_bytes / GIB:.2f}" if candidate.memory else "-",
        f"{time.seconds:.2f}" if time else "-",
        f"{time.tokens_per_s:.0f}" if time else "-",
        f"{total.hours:.2f}" if total else "-",
        f"{total.kwh:.2f}" if total and total.kwh is not None else "-",
        f"{total.price:.2f}" if total and total.price is not None else "-",
        time.limit if time else "-",
        "yes" if candidate.fits else _short(candidate),
    ]


def _short(candidate: Candidate) -> str:
    """The reason in a few words; plan.json has all of it."""
    where = candidate.reason.split(":")[0]
    if not candidate.missing_bytes:
        return "no: " + where
    return f"no: {where} +{candidate.missing_bytes / GIB:.2f} GiB"


def notes(rig: RigProfile, disk: DiskNeed, steps: int | None, documents: int | None) -> list[str]:
    """Lines below the table. ``documents``: the most in a row, None: not known."""
    lines = []
    if rig.measured is None:
        lines.append(
            "rates are ceilings from documents (plan.json has each one's source); those of "
            "`fttrain measure` on the machine itself are better"
        )
    if steps is None:
        lines.append(
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
        *lines,
        f"a step has full rows, {of_rows}",
        f"disk, with every strategy: {gib(disk.total_bytes)}: frozen base {gib(disk.cache_bytes)}, "
        f"snapshots {gib(disk.snapshots_bytes)}",
        "energy: the cards at their power limit for all of that time, an upper bound",
        renting(rig),
    ]


def _of_cards(ranks: Sequence[RankMemory]) -> list[int]:
    """Bytes of each card; one value where all are equal."""
    each = [rank.device_bytes for rank in ranks]
    return each[:1] if len(set(each)) == 1 else each


def parts_table(candidate: Candidate, rig: RigProfile) -> Table:
    """Memory of ``candidate`` by part, a column for each card, the largest parts first."""
    ranks = candidate.memory
    names = [f"card {rank.rank}" for rank in ranks]
    table = Table("GiB", *names, "host", title=candidate.settings, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    on_cards = {part: max(r.device.get(part, 0) for r in ranks) for r in ranks for part in r.device}
    for part in sorted(on_cards, key=lambda part: -on_cards[part]):
        # Negative: reserved parts that never exist at the same time exceed the workspace.
        name = part.label if on_cards[part] >= 0 else NOT_AT_ONCE
        table.add_row(name, *(f"{rank.device.get(part, 0) / GIB:.2f}" for rank in ranks), "")
    on_host = {part: sum(r.host.get(part, 0) for r in ranks) for r in ranks for part in r.host}
    for part, size_bytes in sorted(
        {**on_host, **ranks[0].shared}.items(), key=lambda item: -item[1]
    ):
        table.add_row(part.label, *("" for _ in ranks), f"{size_bytes / GIB:.2f}")
    overheads = [f"{(card.overhead_bytes or 0) / GIB:.2f}" for card in rig.cards]
    source = "measured" if rig.measured else "an allowance"
    table.add_row(f"context, communication ({source})", *overheads, "")
    on_cpu = rig.cards[0].kind == "cpu"
    if not on_cpu:
        allocator = [card.allocator_bytes for card in rig.cards]
        cells = ("not measured" if size is None else f"{size / GIB:.2f}" for size in allocator)
        table.add_row("allocator's rounding, libraries' workspaces", *cells, "")
        if any(card.others_bytes for card in rig.cards):
            others = (f"{(card.others_bytes or 0) / GIB:.2f}" for card in rig.cards)
            table.add_row("other programs, as measured", *others, "")
    sums = [
        f"{(rank.device_bytes + card.beside_bytes) / GIB:.2f}"
        for rank, card in zip(ranks, rig.cards, strict=True)
    ]
    table.add_section()
    # With CPUs all memory is host memory.
    host_bytes = candidate.host_bytes + sum(card.beside_bytes for card in rig.cards if on_cpu)
    table.add_row("together", *sums, f"{host_bytes / GIB:.2f}")
    available = ["" if on_cpu else f"{card.memory_bytes / GIB:.2f}" for card in rig.cards]
    table.add_row("there is", *available, f"{rig.host.memory_bytes / GIB:.2f}")
    return table


def summary(candidate: Candidate, rig: RigProfile, steps: int | None) -> str:
    """The winner in one line."""
    assert candidate.time is not None
    card = max(rank.device_bytes for rank in candidate.memory)
    total = cost(candidate.time, rig, steps)
    duration_text = f", {duration(total.hours * 3600)} for {steps:,} steps" if steps else ""
    price = f", ${total.price:,.2f} to rent" if steps and total.price is not None else ""
    return (
        f"{candidate.settings}: {gib(card)} on the fullest card (run in full on fake tensors), "
        f"{gib(candidate.host_bytes)} of host memory, {candidate.time.seconds:.2f} s a step, "
        f"{candidate.time.tokens_per_s:.0f} tokens/s{duration_text}{price}"
    )


def as_json(
    candidates: Sequence[Candidate], rig: RigProfile, model: str, disk: DiskNeed, steps: int | None
) -> dict[str, Any]:
    """The content of plan.json, in bytes, seconds, hours, kWh and US dollars; cost is that of
    ``steps``, or where that is None of ``part_tokens``.
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
        "candidates": [_candidate(candidate, rig, steps) for candidate in candidates],
    }


def _by_label(parts: Mapping[MemoryPart, int]) -> dict[str, int]:
    return {part.label: size_bytes for part, size_bytes in parts.items()}


def _candidate(candidate: Candidate, rig: RigProfile, steps: int | None) -> dict[str, Any]:
    time = candidate.time
    total = cost(time, rig, steps) if time else None
    return {
        "settings": candidate.settings,
        "fits": candidate.fits,
        "reason": candidate.reason,
        "confirmed": candidate.confirmed,
        "step_s": time.seconds if time else None,
        "tokens_per_s": time.tokens_per_s if time else None,
        "limit": time.limit if time else None,
        "hours": total.hours if total else None,
        "kwh": total.kwh if total else None,
        "price": total.price if total else None,
        "host_bytes": candidate.host_bytes,
        "ranks": [
            {
                "rank": rank.rank,
                "layers": rank.layers,
                "device_bytes": _by_label(rank.device),
                "host_bytes": _by_label(rank.host),
                "shared_bytes": _by_label(rank.shared),
            }
            for rank in candidate.memory
        ],
    }
