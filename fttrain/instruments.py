"""What a run's ranks say of their memory and of their cards, and who looks at it."""

import dataclasses
import json
import math
from typing import Any

import torch

from fttrain.checkpoint.durable import write_json
from fttrain.dist import Group
from fttrain.errors import UserError
from fttrain.rig import memory, telemetry
from fttrain.rig.profile import load_profile, profile_path
from fttrain.rig.telemetry import FIGURES, CardWatch
from fttrain.run import Run
from fttrain.strategy import usage


def tell_memory(run: Run) -> None:
    """Where memory went in the first step, of each rank into memory.json; the fullest one is shown.

    Every rank calls it.
    """
    ranks = memory_uses(run)
    if run.group.is_main:
        write_json(run.output / "memory.json", {"step": run.step, "ranks": ranks})
        show_fullest(run, ranks, f"step {run.step}")


def memory_uses(run: Run) -> list[list[dict[str, Any]]]:
    """Each rank's parts of memory so far (``usage.Use``), by rank. Every rank calls it."""
    own = usage.uses(run.strategy.bookings, run.group.device)
    written = json.dumps([dataclasses.asdict(use) for use in own])
    return [json.loads(run.group.share(written, rank)) for rank in range(run.group.world_size)]


def show_fullest(run: Run, ranks: list[list[dict[str, Any]]], when: str) -> None:
    """What ``memory_uses`` says of the rank with the fullest card."""
    fullest = max(range(len(ranks)), key=lambda rank: sum(u["device_bytes"] for u in ranks[rank]))
    shown = [usage.Use(**use) for use in ranks[fullest]]
    for line in usage.table(shown, f"memory of rank {fullest} in {when}"):
        run.say(line)


def sample_memory(run: Run) -> list[dict[str, int]]:
    """Every rank's memory as it is now, by rank. Every rank calls it."""
    own = memory.sample(run.group.device)
    ranks = run.group.gather([float(size_bytes) for size_bytes in own.values()])
    return [dict(zip(own, map(int, figures), strict=True)) for figures in ranks]


def sample_cards(group: Group) -> list[dict[str, float]]:
    """Every rank's card as it is now, by rank (see ``rig.telemetry``); of CPUs nothing. Every rank
    calls it.
    """
    if group.device.type != "cuda":
        return []
    own = telemetry.sample(group.device)
    # One driver may know what another does not; ranks exchange equally many figures all the same.
    ranks = group.gather([own.get(name, math.nan) for name in FIGURES])
    named = [dict(zip(FIGURES, figures, strict=True)) for figures in ranks]
    return [{k: v for k, v in card.items() if not math.isnan(v)} for card in named]


def card_watch(device: torch.device, cache_dir: str | None) -> CardWatch:
    """One that knows the cards as `fttrain measure` found them on this machine, if it did.

    ``cache_dir``: where the profile is, as frozen.cache_dir.
    """
    path = profile_path(cache_dir)
    if device.type != "cuda" or not path.is_file():
        return CardWatch()
    try:
        profile = load_profile(path)
    except UserError:  # of another version: no reason to stop a run
        return CardWatch()
    name = torch.cuda.get_device_name(device)
    own = profile.measured is not None and any(card.name == name for card in profile.cards)
    return CardWatch(profile.cards if own else ())
