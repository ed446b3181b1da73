"""``fttrain plan --table``: memory of models of common sizes, beside published figures."""

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
    SizeRequest,
    context_bytes,
    estimate_sizes,
)
from fttrain.util.units import GIB, gib

SHOWN = {"whole": "one card", "two": "two, each", "least": "least"}  # scenario -> column
STYLES = {LOW: "red", RIGHT: "green", HIGH: "yellow"}
NAMES = {  # part of a card -> row of the table, in this order; several parts share a row
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

Needs = Mapping[SizeRequest, SizeEstimate]


def show(
    console: Console,
    progress: Callable[[int, int], None],
    models: Sequence[str] = tuple(shapes.SHAPES),
    claims: Sequence[Claim] = CLAIMS,
) -> None:
    """Compute and print the tables of ``models`` and ``claims``. ``progress``: (done, total)."""
    requests = [
        SizeRequest(m, method, scenario) for m in models for method in METHODS for scenario in SHOWN
    ]
    needs = estimate_sizes([*requests, *(claim.request for claim in claims)], progress)
    console.print(sizes_table(models, claims, needs))
    for method in METHODS:
        console.print(parts_table(models, method, needs))
    console.print(claims_table(claims, needs))


def sizes_table(models: Sequence[str], claims: Sequence[Claim], needs: Needs) -> Table:
    """A line for each model and method; GiB of a card and of the host."""
    table = Table(
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
    table.add_column("model", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for name in SHOWN.values():
        table.add_column(name, justify="right")
        table.add_column("host", justify="right", style="dim")
    table.add_column("published")
    for model in models:
        for method in METHODS:
            figures = []
            for scenario in SHOWN:
                need = needs[SizeRequest(model, method, scenario)]
                figures += [f"{need.card_bytes / GIB:.1f}", f"{need.host_bytes / GIB:.1f}"]
            published = (
                c for c in claims if (c.request.model, c.request.method) == (model, method)
            )
            name = model if method == METHODS[0] else ""
            table.add_row(name, method, *figures, _figures(published))
        table.add_section()
    return table


def _figures(claims: Iterable[Claim]) -> str:
    """The figures of ``claims``, each once, by unit."""
    by_unit: dict[str, list[str]] = {}
    for claim in claims:
        values = by_unit.setdefault(claim.unit, [])
        if f"{claim.value:g}" not in values:
            values.append(f"{claim.value:g}")
    return "; ".join(f"{', '.join(values)} {unit}" for unit, values in by_unit.items())


def parts_table(models: Sequence[str], method: str, needs: Needs) -> Table:
    """Memory of one card that holds everything, by part."""
    title = f"{method} on one card, GiB" + (", by formula" if method in FULL else "")
    table = Table("", *map(shapes.size, models), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    cards = [_named(needs[SizeRequest(model, method)].card) for model in models]
    for part in cards[0]:
        table.add_row(part, *(f"{card[part] / GIB:.2f}" for card in cards))
    table.add_section()
    table.add_row("together", *(f"{sum(card.values()) / GIB:.2f}" for card in cards))
    return table


def _named(card: Mapping[MemoryPart, int]) -> dict[str, int]:
    """Bytes of ``card`` by row of the table."""
    rows: dict[str, int] = {}
    for part in sorted(card, key=list(NAMES).index):
        rows[NAMES[part]] = rows.get(NAMES[part], 0) + card[part]
    return rows


def claims_table(claims: Sequence[Claim], needs: Needs) -> Table:
    """A line for each published figure, and where it comes from."""
    sources = dict.fromkeys((claim.publisher, claim.source) for claim in claims)
    table = Table(
        "published by",
        "for",
        "says",
        "it takes",
        "verdict",
        title=f"published; right: within {TOLERANCE:.0%} of what it takes, a card: it suffices",
        title_justify="left",
        caption="\n".join(f"{publisher}: {source}" for publisher, source in sources),
        caption_justify="left",
    )
    for column in table.columns[2:4]:
        column.justify = "right"
    for claim in claims:
        verdict = judge(claim, needs[claim.request])
        why = f": {verdict.why}" if verdict.why else ""
        style = STYLES[verdict.word]
        table.add_row(
            claim.publisher,
            _reading(claim),
            claim.figure,
            verdict.needed,
            f"[{style}]{verdict.word}[/]{why}",
        )
    return table


def _reading(claim: Claim) -> str:
    """The request of ``claim`` in words: what differs from the tables' settings."""
    request, default = claim.request, SizeRequest(claim.request.model, claim.request.method)
    names = {**SHOWN, "frugal": "inputs of layers on the host, 8-bit moments"}
    texts = [f"{request.method} {request.model}"]
    if request.scenario != default.scenario:
        texts.append(names[request.scenario])
    if (request.rows, request.seq_len) != (default.rows, default.seq_len):
        texts.append(f"{request.rows} x {request.seq_len}")
    if request.r != default.r and request.method not in FULL:
        texts.append(f"r={request.r}")
    if claim.by_torch:
        texts.append("without context")
    return ", ".join(texts)
