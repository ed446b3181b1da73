"""Rates and sizes of a rig: a ``RigProfile``, measured here or shipped with its sources.

    profile.json    {"form": 1, "name": ..., "measured": {date, machine, versions ...} | null,
                     "cards": [...], "host": {...}, "links": [...], "sources": {...}}

Rates are per second, with SI prefixes (1e9, 1e12); times are seconds, medians. A rate that was not
measured is None; the error of its first use names it.
"""

import bisect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fttrain.util.atomic_files import write_text
from fttrain.util.cache_dir import cache_root
from fttrain.util.errors import UserError

FILE_NAME = "rig_{ranks}.json"  # in the cache folder, one for each number of ranks
OLD_FILE_NAME = "rig.json"  # for any number of ranks, read where there is no other
FORM = 1  # of the file; another one is refused
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send_recv")


@dataclass(frozen=True)
class CopyRates:
    """Copies between host and card, bytes a second of one card."""

    pinned_bytes_per_s: float | None = None  # from or into page-locked memory, alone
    pageable_bytes_per_s: float | None = None
    both_ways_bytes_per_s: float | None = None  # page-locked, while the other direction copies
    all_cards_bytes_per_s: float | None = None  # page-locked, while all other cards do the same


@dataclass(frozen=True)
class CardProfile:
    """One rank's device: a GPU, or a CPU's share of its cores and of the host's memory."""

    name: str
    kind: str  # cuda | cpu
    memory_bytes: int  # of the card; a rank's share where ranks share it, as with a CPU
    gemm_flop_per_s: float | None = None  # in the training dtype, at the model's shapes
    dequantise_bytes_per_s: float | None = None  # bytes of bf16 dequantised from 4 bits
    memory_bytes_per_s: float | None = None  # read and written, of a large copy on the device
    to_card: CopyRates = field(default_factory=CopyRates)
    to_host: CopyRates = field(default_factory=CopyRates)
    # None: not available. pcie_generation and pcie_width: current; *_most: of card and slot
    pcie_generation: int | None = None
    pcie_generation_most: int | None = None
    pcie_width: int | None = None
    pcie_width_most: int | None = None
    nvlink_lanes: int | None = None
    numa_node: int | None = None
    peer_access: bool | None = None  # whether it can read every other card's memory
    power_limit_w: float | None = None
    price_per_h: float | None = None  # US dollars, of renting one
    # Memory of one rank outside its tensors: context and communication buffers; on a CPU the
    # resident bytes of a process with its libraries
    overhead_bytes: int | None = None
    # Bytes that torch's allocator holds beyond live tensors in real steps, and loaded kernels;
    # None: not measured
    allocator_bytes: int | None = None
    # Bytes of other programs during the measurement, such as a display; None: unknown
    others_bytes: int | None = None
    # From real steps (fttrain/plan/trial.py). None: work outside GEMMs takes no time
    layer_values_per_s: float | None = None  # as plan/work.py counts them: all but GEMMs
    head_flop_per_s: float | None = None  # the head's GEMMs, the loss and its gradient included

    @property
    def beside_bytes(self) -> int:
        """Bytes of its memory that tensors cannot use."""
        return sum(
            size or 0 for size in (self.overhead_bytes, self.allocator_bytes, self.others_bytes)
        )


@dataclass(frozen=True)
class HostProfile:
    """The machine of the cards."""

    cpu: str
    cores: int
    memory_bytes: int
    memory_bytes_per_s: float | None = None  # read and written, of a large copy
    disk_bytes_per_s: float | None = None  # reading the frozen cache, pages not in memory
    adamw_values_per_s: float | None = None  # fp32 values that the CPU's AdamW updates


@dataclass(frozen=True)
class LinkSample:
    """A measured collective of one size."""

    size_bytes: int  # of the whole tensor, as nccl-tests counts: all_gather's output, for example
    seconds: float  # median
    cores_s: float = 0.0  # CPU seconds of the busiest rank


@dataclass(frozen=True)
class LinkProfile:
    """The rates of one transport between ranks."""

    transport: str  # as requested: default | no_p2p | sockets | gloo
    seen: str  # the carrier of the bytes, by the library's log or the driver's counters
    ranks: int
    samples: dict[str, tuple[LinkSample, ...]]  # by collective, sizes ascending
    wrong: str = ""  # the error in a result; such a link has no times
    as_asked: bool = True  # whether the carrier is one that the transport allows
    # Seconds of a step's adapter gradients of the measured model, layer after layer, alone
    gradients_s: float | None = None

    def seconds(self, collective: str, size_bytes: float) -> float:
        """Seconds of a ``collective`` of ``size_bytes``: interpolated between two measured sizes;
        above the largest at its rate, below the smallest as long as that.

        Raises UserError where it was not measured.
        """
        return self._between(collective, size_bytes, lambda sample: sample.seconds)

    def cores_s(self, collective: str, size_bytes: float) -> float:
        """CPU seconds of a ``collective``, as ``seconds``: a CPU cannot compute meanwhile."""
        return self._between(collective, size_bytes, lambda sample: sample.cores_s)

    def _between(
        self, collective: str, size_bytes: float, value: Callable[[LinkSample], float]
    ) -> float:
        samples = self.samples.get(collective, ())
        if not samples:
            raise UserError(f"link {self.transport}: {collective} was not measured")
        sizes = [sample.size_bytes for sample in samples]
        index = bisect.bisect_left(sizes, size_bytes)
        if index == 0:
            return value(samples[0])
        if index == len(samples):
            return value(samples[-1]) * size_bytes / samples[-1].size_bytes
        low, high = samples[index - 1], samples[index]
        share = (size_bytes - low.size_bytes) / (high.size_bytes - low.size_bytes)
        return value(low) + share * (value(high) - value(low))


def algorithm_bytes_per_s(sample: LinkSample) -> float:
    """Size over time in bytes/s, nccl-tests' "algbw"."""
    return sample.size_bytes / sample.seconds


def bus_bytes_per_s(collective: str, sample: LinkSample, ranks: int) -> float:
    """nccl-tests' "busbw" in bytes/s (its doc/PERFORMANCE.md): the rate of each link if it were the
    limit, comparable between collectives and numbers of ranks.
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
    """The date, machine and software of a measured profile."""

    date: str  # ISO 8601, UTC
    machine: str  # hashed identity, the same after a reboot
    versions: dict[str, str]  # torch, CUDA, the driver, NCCL, bitsandbytes


@dataclass(frozen=True)
class RigProfile:
    """The cards, host and links of a rig: the input of a plan."""

    name: str
    cards: tuple[CardProfile, ...]  # by local rank
    host: HostProfile
    links: tuple[LinkProfile, ...] = ()
    measured: Measured | None = None  # None: shipped, with figures from ``sources``
    sources: dict[str, str] = field(default_factory=dict)  # figure -> its source

    def link(self, transport: str = "") -> LinkProfile:
        """The working link of ``transport``; with "" the first one that works.

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
        write_text(path, text + "\n")


def profile_path(ranks: int, cache_dir: str | None = None) -> Path:
    """The file of `fttrain measure` for ``ranks``. ``cache_dir``: as frozen.cache_dir."""
    return cache_root(cache_dir) / FILE_NAME.format(ranks=ranks)


def measured_profile_path(cache_dir: str | None = None, ranks: int | None = None) -> Path | None:
    """The measured profile for ``ranks``; without one, or with None, that of the most ranks. None
    where nothing was measured.
    """
    root = cache_root(cache_dir)
    paths = root.glob(FILE_NAME.format(ranks="*"))
    by_suffix = {path.stem.rpartition("_")[2]: path for path in paths}
    by_ranks = {int(number): path for number, path in by_suffix.items() if number.isdecimal()}
    if by_ranks:
        return by_ranks.get(ranks or 0, by_ranks[max(by_ranks)])
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
    """The card whose ``asdict`` is ``content``."""
    ways = {way: CopyRates(**content.pop(way)) for way in ("to_card", "to_host")}
    return CardProfile(**{**content, **ways})


def _link(content: dict[str, Any]) -> LinkProfile:
    samples = {
        name: tuple(LinkSample(**sample) for sample in entries)
        for name, entries in _pairs(content.pop("samples"))
    }
    return LinkProfile(**content, samples=samples)


def _pairs(samples: dict[str, Sequence[Any]]) -> Sequence[tuple[str, Sequence[Any]]]:
    unknown = sorted(samples.keys() - set(COLLECTIVES))
    if unknown:
        raise ValueError(f"{unknown[0]} is no collective")
    return list(samples.items())
