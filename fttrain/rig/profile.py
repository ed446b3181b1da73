"""What a rig can do, in numbers: a ``RigProfile``, measured here or shipped with its sources.

    profile.json    {"form": 1, "name": ..., "measured": {date, machine, versions ...} | null,
                     "cards": [...], "host": {...}, "links": [...], "sources": {...}}

Rates are per second and in bytes or FLOP of SI (1e9, 1e12); times are seconds, medians. A rate that
nobody has measured is None: whoever needs it says so by name.
"""

import bisect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fttrain.util.cache_dir import cache_root
from fttrain.util.errors import UserError

FILE_NAME = "rig_{ranks}.json"  # in the cache folder: fewer ranks never replace more
OLD_FILE_NAME = "rig.json"  # of any number of ranks, where there is no other
FORM = 1  # of the file; another one is refused
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send_recv")


@dataclass(frozen=True)
class CopyRates:
    """Copies between host and card, bytes a second of one card."""

    pinned_bytes_per_s: float | None = None  # out of or into page-locked memory, nothing beside it
    pageable_bytes_per_s: float | None = None
    both_ways_bytes_per_s: float | None = None  # page-locked, while the other direction copies, too
    all_cards_bytes_per_s: float | None = None  # page-locked, while all other cards do the same


@dataclass(frozen=True)
class CardProfile:
    """One rank's device: a GPU, or a CPU's share of its cores and of the host's memory."""

    name: str
    kind: str  # cuda | cpu
    memory_bytes: int  # that the card has; the share of a rank, where ranks share it, as a CPU
    gemm_flop_per_s: float | None = None  # in the training dtype, at the model's shapes
    dequantise_bytes_per_s: float | None = None  # bytes of bf16 made out of 4 bits
    memory_bytes_per_s: float | None = None  # read and written, of a large copy on the device
    to_card: CopyRates = field(default_factory=CopyRates)
    to_host: CopyRates = field(default_factory=CopyRates)
    # None: not available. pcie_generation and pcie_width: now; *_most: what card and slot can do
    pcie_generation: int | None = None
    pcie_generation_most: int | None = None
    pcie_width: int | None = None
    pcie_width_most: int | None = None
    nvlink_lanes: int | None = None
    numa_node: int | None = None
    peer_access: bool | None = None  # whether it can read every other card's memory
    power_limit_w: float | None = None
    price_per_h: float | None = None  # US dollars, of renting one
    # Of one rank, beside its tensors: context and communication buffers; of a CPU all that is
    # resident of a process with its libraries
    overhead_bytes: int | None = None
    # That torch's allocator holds beyond live tensors, and kernels that were loaded for them, of
    # real steps; None: not measured
    allocator_bytes: int | None = None
    # That other programs held while it was measured, a display for one; None: nobody knows
    others_bytes: int | None = None
    # Of real steps (fttrain/plan/trial.py). None: what is not a GEMM takes no time
    layer_values_per_s: float | None = None  # as plan/work.py counts them: all but GEMMs
    head_flop_per_s: float | None = None  # the head's GEMMs, the loss and its gradient included

    @property
    def beside_bytes(self) -> int:
        """Of its memory, what tensors cannot have."""
        return sum(
            size or 0 for size in (self.overhead_bytes, self.allocator_bytes, self.others_bytes)
        )


@dataclass(frozen=True)
class HostProfile:
    """The machine that the cards are in."""

    cpu: str
    cores: int
    memory_bytes: int
    memory_bytes_per_s: float | None = None  # read and written, of a large copy
    disk_bytes_per_s: float | None = None  # reading the frozen cache, pages not in memory
    adamw_values_per_s: float | None = None  # fp32 values that the CPU's AdamW updates


@dataclass(frozen=True)
class LinkSample:
    """A collective of one size."""

    size_bytes: int  # of the whole tensor, as nccl-tests counts: all_gather's output, for example
    seconds: float  # median
    cores_s: float = 0.0  # that it keeps the processor's cores busy, of the busiest rank


@dataclass(frozen=True)
class LinkProfile:
    """How ranks talk over one transport."""

    transport: str  # as it was asked for: default | no_p2p | sockets | gloo
    seen: str  # what really carried the bytes, by the library's own log or the driver's counters
    ranks: int
    samples: dict[str, tuple[LinkSample, ...]]  # by collective, sizes ascending
    wrong: str = ""  # what was wrong with a result; such a link is named, and not timed
    as_asked: bool = True  # whether what was seen is what the transport's name says
    # Adapter gradients of a step of the model that was measured, layer after layer, nothing beside
    gradients_s: float | None = None

    def seconds(self, collective: str, size_bytes: float) -> float:
        """Of a ``collective`` of ``size_bytes``: between two measured sizes on the line through
        them, beyond the ends at the rate of the last one and no faster than the smallest.

        Raises UserError where it was not measured.
        """
        return self._between(collective, size_bytes, lambda sample: sample.seconds)

    def cores_s(self, collective: str, size_bytes: float) -> float:
        """Of a processor's core, as ``seconds``: what a CPU cannot compute meanwhile."""
        return self._between(collective, size_bytes, lambda sample: sample.cores_s)

    def _between(
        self, collective: str, size_bytes: float, of: Callable[[LinkSample], float]
    ) -> float:
        found = self.samples.get(collective, ())
        if not found:
            raise UserError(f"link {self.transport}: {collective} was not measured")
        sizes = [sample.size_bytes for sample in found]
        place = bisect.bisect_left(sizes, size_bytes)
        if place == 0:
            return of(found[0])
        if place == len(found):
            return of(found[-1]) * size_bytes / found[-1].size_bytes
        low, high = found[place - 1], found[place]
        share = (size_bytes - low.size_bytes) / (high.size_bytes - low.size_bytes)
        return of(low) + share * (of(high) - of(low))


def algorithm_bytes_per_s(sample: LinkSample) -> float:
    """Size over time, nccl-tests' "algbw"."""
    return sample.size_bytes / sample.seconds


def bus_bytes_per_s(collective: str, sample: LinkSample, ranks: int) -> float:
    """nccl-tests' "busbw" (its doc/PERFORMANCE.md): what each link would carry if it were the
    limit, comparable between collectives and rank counts.
    """
    part = (ranks - 1) / ranks
    factor = {
        "all_reduce": 2 * part,
        "all_gather": part,
        "reduce_scatter": part,
        "broadcast": 1.0,
        "send_recv": 1.0,
    }[collective]
    return algorithm_bytes_per_s(sample) * factor


@dataclass(frozen=True)
class Measured:
    """When, where and with what a profile was made."""

    date: str  # ISO 8601, UTC
    machine: str  # an identity that does not change with a reboot, hashed
    versions: dict[str, str]  # of torch, CUDA, the driver, NCCL, bitsandbytes


@dataclass(frozen=True)
class RigProfile:
    """Everything that a plan is made from."""

    name: str
    cards: tuple[CardProfile, ...]  # by local rank
    host: HostProfile
    links: tuple[LinkProfile, ...] = ()
    measured: Measured | None = None  # None: shipped, its figures are those of ``sources``
    sources: dict[str, str] = field(default_factory=dict)  # figure -> where it is from

    def link(self, transport: str = "") -> LinkProfile:
        """That of ``transport``; without one the first whose results are right.

        Raises UserError where there is none.
        """
        for link in self.links:
            if transport in ("", link.transport) and not link.wrong:
                return link
        known = ", ".join(link.transport for link in self.links) or "none"
        raise UserError(f"rig {self.name}: no link {transport or 'that works'}; there are: {known}")

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        text = json.dumps({"form": FORM, **asdict(self)}, indent=1, allow_nan=False)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)


def profile_path(ranks: int, cache_dir: str | None = None) -> Path:
    """Where `fttrain measure` keeps what so many ranks have. ``cache_dir``: as frozen.cache_dir."""
    return cache_root(cache_dir) / FILE_NAME.format(ranks=ranks)


def kept_profile(cache_dir: str | None = None, ranks: int | None = None) -> Path | None:
    """The file of so many ``ranks``; where it is not there, or None is asked for, that of the most.
    None where nothing was measured.
    """
    root = cache_root(cache_dir)
    paths = root.glob(FILE_NAME.format(ranks="*"))
    numbers = {path.stem.rpartition("_")[2]: path for path in paths}
    found = {int(number): path for number, path in numbers.items() if number.isdecimal()}
    if found:
        return found.get(ranks or 0, found[max(found)])
    old = root / OLD_FILE_NAME
    return old if old.is_file() else None


def load_profile(path: Path) -> RigProfile:
    """The profile in ``path``. Raises UserError for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("form") != FORM:
            raise UserError(
                f"{path}: a profile of another version; `fttrain measure` makes a new one"
            )
        return _profile(content)
    except FileNotFoundError:
        raise UserError(f"{path}: no rig profile is there; `fttrain measure` makes one") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: no rig profile ({type(error).__name__}: {error}); `fttrain measure` makes one"
        ) from error


def _profile(content: dict[str, Any]) -> RigProfile:
    measured = content["measured"]
    return RigProfile(
        name=content["name"],
        cards=tuple(card_of(card) for card in content["cards"]),
        host=HostProfile(**content["host"]),
        links=tuple(_link(link) for link in content["links"]),
        measured=None if measured is None else Measured(**measured),
        sources=content["sources"],
    )


def card_of(content: dict[str, Any]) -> CardProfile:
    """A card from what ``asdict`` makes of it."""
    ways = {way: CopyRates(**content.pop(way)) for way in ("to_card", "to_host")}
    return CardProfile(**{**content, **ways})


def _link(content: dict[str, Any]) -> LinkProfile:
    samples = {
        name: tuple(LinkSample(**sample) for sample in found)
        for name, found in _pairs(content.pop("samples"))
    }
    return LinkProfile(**content, samples=samples)


def _pairs(samples: dict[str, Sequence[Any]]) -> Sequence[tuple[str, Sequence[Any]]]:
    unknown = sorted(samples.keys() - set(COLLECTIVES))
    if unknown:
        raise ValueError(f"{unknown[0]} is no collective")
    return list(samples.items())
