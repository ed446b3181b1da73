"""measure.md, its plot, and the tables that ``fttrain measure`` prints."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from fttrain.rig.measure import MeasuredShapes
from fttrain.rig.profile import (
    COLLECTIVES,
    LinkProfile,
    RigProfile,
    algorithm_bytes_per_s,
    bus_bytes_per_s,
)
from fttrain.util.atomic_files import replace_unsynced
from fttrain.util.units import KIB, MIB, duration, gib

PLOT = "measure.png"
NONE = "not available"
PASSES = 3  # of a layer's frozen GEMMs in a step: forward, recomputed, gradients of the inputs


_COPIES = {  # row of the table -> field of CopyRates
    "page-locked": "pinned_bytes_per_s",
    "pageable": "pageable_bytes_per_s",
    "both ways at once": "both_ways_bytes_per_s",
    "all cards at once": "all_cards_bytes_per_s",
}


@dataclass(frozen=True)
class ReportTable:
    """Rows under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"## {self.title}\n\n{text}\n" + (f"\n{self.below}\n" if self.below else "")

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        if self.below:
            console.print(self.below, highlight=False)


def tables(profile: RigProfile, work: MeasuredShapes) -> list[ReportTable]:
    """The tables on the terminal; the report adds one of every size."""
    result = [_cards(profile), _copies(profile), _host(profile)]
    if profile.links:
        result.append(links_table(profile))
    if any(not link.wrong for link in profile.links):
        result.append(_meaning(profile, work))
    return result


def write_report(
    folder: Path, profile: RigProfile, work: MeasuredShapes, printed: Sequence[ReportTable]
) -> Path:
    """Write measure.md and its plot into ``folder``; return the path of measure.md. ``printed``:
    the tables above that of all sizes.
    """
    assert profile.measured is not None
    versions = ", ".join(f"{name} {value}" for name, value in profile.measured.versions.items())
    parts = [
        f"# {profile.name}\n\n{profile.measured.date}, machine {profile.measured.machine}\n\n"
        f"{versions}\n\nModel: {work.name}, micro-batches of {work.tokens:,} tokens. Rates are "
        "medians, GB and TFLOP of 1e9 and 1e12.\n"
    ]
    parts += [table.markdown() for table in printed]
    if any(link.samples for link in profile.links):
        parts.append(_sizes(profile, work).markdown())
        plot_links(folder / PLOT, profile.links)
        parts.append(f"![bus bandwidth over size]({PLOT})\n")
    path = folder / "measure.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def plot_links(path: Path, links: Iterable[LinkProfile]) -> None:
    """Bus bandwidth over size: a colour a collective, a line style a transport."""
    from matplotlib.figure import Figure  # heavy

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes: Any = figure.subplots()
    for link, style in zip(links, ("-", "--", ":", "-."), strict=False):
        for number, (name, samples) in enumerate(link.samples.items()):
            rates = [bus_bytes_per_s(name, sample, link.ranks) / 1e9 for sample in samples]
            axes.loglog(
                [sample.size_bytes / MIB for sample in samples],
                rates,
                style,
                marker=".",
                color=f"C{number}",
                label=f"{link.transport}: {name}",
            )
    axes.set_xlabel("size, MiB")
    axes.set_ylabel("bus bandwidth, GB/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    replace_unsynced(path, lambda part: figure.savefig(part, dpi=120, format="png"))


def _cards(profile: RigProfile) -> ReportTable:
    columns = ["", *(f"rank {rank}" for rank in range(len(profile.cards)))]
    rows = {
        "card": [card.name for card in profile.cards],
        "memory": [gib(card.memory_bytes) for card in profile.cards],
        "taken beside tensors": [
            NONE if card.overhead_bytes is None else gib(card.overhead_bytes)
            for card in profile.cards
        ],
        "held beside tensors by torch": [
            NONE if card.allocator_bytes is None else gib(card.allocator_bytes)
            for card in profile.cards
        ],
        "held by other programs": [
            NONE if card.others_bytes is None else gib(card.others_bytes) for card in profile.cards
        ],
        "GEMMs, TFLOP/s": [_scaled(card.gemm_flop_per_s, 1e12) for card in profile.cards],
        "head with its loss, TFLOP/s": [
            _scaled(card.head_flop_per_s, 1e12) for card in profile.cards
        ],
        "a layer but for GEMMs, million values/s": [
            _scaled(card.layer_values_per_s, 1e6) for card in profile.cards
        ],
        "dequantised, GB/s": [_gb(card.dequantise_bytes_per_s) for card in profile.cards],
        "its memory, GB/s": [_gb(card.memory_bytes_per_s) for card in profile.cards],
        "PCIe now": [_pcie(card.pcie_generation, card.pcie_width) for card in profile.cards],
        "PCIe at most": [
            _pcie(card.pcie_generation_most, card.pcie_width_most) for card in profile.cards
        ],
        "NVLink lanes": [_plain(card.nvlink_lanes) for card in profile.cards],
        "reads the others' memory": [_plain(card.peer_access) for card in profile.cards],
        "NUMA node": [_plain(card.numa_node) for card in profile.cards],
        "power limit, W": [_plain(card.power_limit_w) for card in profile.cards],
    }
    return ReportTable("Cards", columns, [[name, *cells] for name, cells in rows.items()])


def _copies(profile: RigProfile) -> ReportTable:
    columns = ["GB/s of a card", *(f"rank {rank}" for rank in range(len(profile.cards)))]
    rows = []
    for name, of in (("host to card", "to_card"), ("card to host", "to_host")):
        for how, rate in _COPIES.items():
            rates = [getattr(getattr(card, of), rate) for card in profile.cards]
            if any(rates):
                rows.append([f"{name}, {how}", *map(_gb, rates)])
    if not rows:
        rows.append(["between host and card", *(NONE for _ in profile.cards)])
    return ReportTable("Copies", columns, rows)


def _host(profile: RigProfile) -> ReportTable:
    host = profile.host
    rows = [
        ["processor", host.cpu],
        ["cores", str(host.cores)],
        ["memory", gib(host.memory_bytes)],
        ["its memory, GB/s", _gb(host.memory_bytes_per_s)],
        ["disk read, GB/s", _gb(host.disk_bytes_per_s)],
        ["AdamW, million values/s", _scaled(host.adamw_values_per_s, 1e6)],
    ]
    return ReportTable("Host", ["", "all ranks"], rows)


def links_table(profile: RigProfile) -> ReportTable:
    """The carrier of each link, and the best bus bandwidth of each collective."""
    seen = [
        link.seen if link.as_asked else f"{link.seen} (not what was asked for)"
        for link in profile.links
    ]
    rows = [["carried by", *seen]]
    for name in COLLECTIVES:
        rows.append([f"{name}, bus GB/s at best", *(_best(link, name) for link in profile.links)])
    wrong = [f"{link.transport} is WRONG: {link.wrong}" for link in profile.links if link.wrong]
    columns = ["", *(link.transport for link in profile.links)]
    return ReportTable(
        f"Links between {profile.links[0].ranks} ranks", columns, rows, "\n".join(wrong)
    )


def _sizes(profile: RigProfile, work: MeasuredShapes) -> ReportTable:
    """A row for every sample."""
    rows = []
    for link in profile.links:
        for name, samples in link.samples.items():
            for sample in samples:
                difference_bytes = sample.size_bytes - work.true_bytes.get(name, -1)
                rows.append(
                    [
                        f"{link.transport}: {name}",
                        _size(sample.size_bytes)
                        + (" (the model's)" if 0 <= difference_bytes < 64 else ""),
                        f"{sample.seconds * 1e3:.3f}",
                        f"{algorithm_bytes_per_s(sample) / 1e9:.3f}",
                        f"{bus_bytes_per_s(name, sample, link.ranks) / 1e9:.3f}",
                    ]
                )
    columns = ["link", "size", "ms", "algorithm GB/s", "bus GB/s"]
    return ReportTable("Collectives by size", columns, rows)


def _meaning(profile: RigProfile, work: MeasuredShapes) -> ReportTable:
    """The cost of each link in a step of this model."""
    compute_s = _compute_s(profile, work)
    links = [link for link in profile.links if not link.wrong]
    rows = []
    for link in links:
        costs = (
            link.gradients_s or work.layers * link.seconds("all_reduce", work.gradient_bytes),
            max(0, 2 * work.layers - 4) * link.seconds("all_gather", work.layer_bytes),
            work.micro_batches * link.seconds("send_recv", work.boundary_bytes),
        )
        cells = (f"{cost:.3f} ({cost / compute_s:.1%})" for cost in costs)
        rows.append([link.transport, f"{compute_s:.3f}", *cells])
    below = (
        f"{work.micro_batches} micro-batches of {work.tokens:,} tokens a rank, {work.layers} "
        "layers. In brackets: of the time of the GEMMs, behind which most of it can hide; what is "
        "above 100 % cannot. Gradients were measured all together, the others follow from one "
        "layer and one boundary."
    )
    return ReportTable(
        f"What a step of {work.name} asks of a link",
        ["seconds a step", "frozen GEMMs", "gradients", "layers (shard)", "boundaries (pipeline)"],
        rows,
        "\n".join([below, *_savings(links, compute_s)]),
    )


def _savings(links: Sequence[LinkProfile], compute_s: float) -> list[str]:
    """A line for each link slower than the default: the part of a step that the default saves, if
    nothing hides the gradients.
    """
    usual, *others = links
    lines = []
    for other in others:
        if usual.gradients_s is None or other.gradients_s is None:
            continue
        whole_s = compute_s + other.gradients_s
        saved = (other.gradients_s - usual.gradients_s) / whole_s
        if saved > 0:
            lines.append(
                f"{usual.transport} ({usual.seen}) saves at most {saved:.1%} of a step with "
                f"strategy=replicate beside {other.transport} ({other.seen})."
            )
    return lines


def _compute_s(profile: RigProfile, work: MeasuredShapes) -> float:
    """Seconds of a step's GEMMs with frozen weights, on the slowest card."""
    rates = [card.gemm_flop_per_s for card in profile.cards if card.gemm_flop_per_s]
    return PASSES * work.layers * work.micro_batches * work.gemm_flop / min(rates)


def closing_line(profile: RigProfile, seconds: float) -> str:
    """The last line of the output."""
    good = sum(not link.wrong for link in profile.links)
    links = f"{good} of {len(profile.links)} links work; " if profile.links else ""
    return f"{links}measured in {duration(seconds)}"


def _best(link: LinkProfile, name: str) -> str:
    rates = [bus_bytes_per_s(name, sample, link.ranks) for sample in link.samples.get(name, ())]
    return f"{max(rates) / 1e9:.3f}" if rates else "-"


def _size(size_bytes: int) -> str:
    whole = size_bytes >= MIB
    return f"{size_bytes / MIB:.4g} MiB" if whole else f"{size_bytes / KIB:.4g} KiB"


def _gb(rate: float | None) -> str:
    return _scaled(rate, 1e9)


def _scaled(rate: float | None, unit: float) -> str:
    return NONE if rate is None else f"{rate / unit:.4g}"


def _plain(value: object) -> str:
    return NONE if value is None else str(value)


def _pcie(generation: int | None, width: int | None) -> str:
    return NONE if generation is None or width is None else f"{generation}.0 x{width}"
