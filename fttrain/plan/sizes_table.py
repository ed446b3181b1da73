"""``fttrain plan --table``: what sizes of models take, beside what others publish."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from fttrain.memory.parts import MemoryPart
from fttrain.plan import shapes
from fttrain.plan.reference_claims import CLAIMS, HIGH, LOW, RIGHT, TOLERANCE, Claim, judge
from fttrain.plan.sizes import (
    FULL,
    METHODS,
    SEQ_LEN,
    SizeEstimate,
    SizeQuestion,
    context_bytes,
    estimate_sizes,
)
from fttrain.util.units import GIB, gib

SHOWN = {"whole": "one card", "two": "two, each", "least": "least"}  # place -> column
STYLES = {LOW: "red", RIGHT: "green", HIGH: "yellow"}
NAMES = {  # part of a card -> as it is shown, in this order
    MemoryPart.FROZEN_LAYERS: "frozen base",
    MemoryPart.EMBEDDING: "embedding and head",
    MemoryPart.HEAD: "embedding and head",
    MemoryPart.ADAPTERS: "adapters with moments",
    MemoryPart.TRAINED_WEIGHTS: "weights",
    MemoryPart.GRADIENTS: "gradients",
    MemoryPart.FP32_MASTERS: "fp32 master",
    MemoryPart.MOMENTS: "moments",
    MemoryPart.ACTIVATIONS: "inputs of layers",
    MemoryPart.LOGITS: "logits",
    MemoryPart.DEQUANTIZED_WEIGHTS: "a layer's step",
    MemoryPart.WORKSPACE: "a layer's step",
    MemoryPart.CONTEXT: "context, libraries",
}

Needs = Mapping[SizeQuestion, SizeEstimate]


def show(
    console: Console,
    progress: Callable[[int, int], None],
    models: Sequence[str] = tuple(shapes.SHAPES),
    claims: Sequence[Claim] = CLAIMS,
) -> None:
    """Reckons and prints the tables of ``models`` and ``claims``. ``progress``: (done, total)."""
    wanted = [
        SizeQuestion(m, method, place) for m in models for method in METHODS for place in SHOWN
    ]
    needs = estimate_sizes([*wanted, *(claim.question for claim in claims)], progress)
    console.print(sizes_table(models, claims, needs))
    for method in METHODS:
        console.print(parts_table(models, method, needs))
    console.print(claims_table(claims, needs))


def sizes_table(models: Sequence[str], claims: Sequence[Claim], needs: Needs) -> Table:
    """A line for each model and method; GiB of a card and of the host."""
    found = Table(
        title=f"GiB of memory, rows of {SEQ_LEN:,} tokens one by one, LoRA r=16 on all linears",
        title_justify="left",
        caption=(
            "one card: all on it, layers recomputed. two, each: strategy=shard (pipeline takes "
            "about two layers less); least: one card, strategy=stream; both with "
            "layer_inputs=host, "
            "embedding=host, lm_head=host and optim.offload=true. Full fine-tuning is not done "
            "here: by formula, "
            f"{' or '.join(str(sum(each.values())) for each in FULL.values())} bytes a parameter "
            "(ZeRO), half of them on each of two cards, or all but the weights on the host "
            f"(ZeRO-Offload). Cards: with {gib(context_bytes())} for context and libraries; host: "
            "without the interpreter and its libraries."
        ),
        caption_justify="left",
    )
    found.add_column("model", no_wrap=True)
    found.add_column("method", no_wrap=True)
    for name in SHOWN.values():
        found.add_column(name, justify="right")
        found.add_column("host", justify="right", style="dim")
    found.add_column("published")
    for model in models:
        for method in METHODS:
            figures = []
            for place in SHOWN:
                need = needs[SizeQuestion(model, method, place)]
                figures += [f"{need.card_bytes / GIB:.1f}", f"{need.host_bytes / GIB:.1f}"]
            of_these = (
                c for c in claims if (c.question.model, c.question.method) == (model, method)
            )
            name = model if method == METHODS[0] else ""
            found.add_row(name, method, *figures, _said(of_these))
        found.add_section()
    return found


def _said(claims: Iterable[Claim]) -> str:
    """Their figures, each once, by unit."""
    by_unit: dict[str, list[str]] = {}
    for claim in claims:
        values = by_unit.setdefault(claim.unit, [])
        if f"{claim.value:g}" not in values:
            values.append(f"{claim.value:g}")
    return "; ".join(f"{', '.join(values)} {unit}" for unit, values in by_unit.items())


def parts_table(models: Sequence[str], method: str, needs: Needs) -> Table:
    """Where the memory of one card goes that has everything."""
    title = f"{method} on one card, GiB" + (", by formula" if method in FULL else "")
    found = Table("", *map(shapes.size, models), title=title, title_justify="left")
    for column in found.columns[1:]:
        column.justify = "right"
    cards = [_named(needs[SizeQuestion(model, method)].card) for model in models]
    for part in cards[0]:
        found.add_row(part, *(f"{card[part] / GIB:.2f}" for card in cards))
    found.add_section()
    found.add_row("together", *(f"{sum(card.values()) / GIB:.2f}" for card in cards))
    return found


def _named(card: Mapping[MemoryPart, int]) -> dict[str, int]:
    """``card``'s parts as they are shown."""
    found: dict[str, int] = {}
    for part in sorted(card, key=list(NAMES).index):
        found[NAMES[part]] = found.get(NAMES[part], 0) + card[part]
    return found


def claims_table(claims: Sequence[Claim], needs: Needs) -> Table:
    """A line for each published figure, and where it comes from."""
    sources = dict.fromkeys((claim.who, claim.source) for claim in claims)
    found = Table(
        "published by",
        "for",
        "says",
        "it takes",
        "verdict",
        title=f"published; right: within {TOLERANCE:.0%} of what it takes, a card: it suffices",
        title_justify="left",
        caption="\n".join(f"{who}: {source}" for who, source in sources),
        caption_justify="left",
    )
    for column in found.columns[2:4]:
        column.justify = "right"
    for claim in claims:
        verdict = judge(claim, needs[claim.question])
        why = f": {verdict.why}" if verdict.why else ""
        style = STYLES[verdict.word]
        found.add_row(
            claim.who,
            _reading(claim),
            claim.said,
            verdict.needed,
            f"[{style}]{verdict.word}[/]{why}",
        )
    return found


def _reading(claim: Claim) -> str:
    """What ``claim`` is read for, where it is not what the tables are made for."""
    asked, usual = claim.question, SizeQuestion(claim.question.model, claim.question.method)
    places = {**SHOWN, "frugal": "inputs of layers on the host, 8-bit moments"}
    said = [f"{asked.method} {asked.model}"]
    if asked.place != usual.place:
        said.append(places[asked.place])
    if (asked.rows, asked.seq_len) != (usual.rows, usual.seq_len):
        said.append(f"{asked.rows} x {asked.seq_len}")
    if asked.r != usual.r and asked.method not in FULL:
        said.append(f"r={asked.r}")
    if claim.by_torch:
        said.append("without context")
    return ", ".join(said)
