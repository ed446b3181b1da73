"""Whether a measured profile still describes this machine."""

import psutil
import torch

from fttrain.memory.device import ranks_a_device
from fttrain.rig import machine
from fttrain.rig.profile import RigProfile, load_profile, measured_profile_path
from fttrain.util.errors import UserError
from fttrain.util.units import GIB

SAME = 0.02  # relative difference of memory sizes that kernels and drivers explain
WATCHED = ("torch", "driver")  # versions that rates depend on most

Kind = tuple[str, int]  # name and memory of a rank's card


def is_here(profile: RigProfile) -> bool:
    """Whether it was measured on this machine, or is a shipped one."""
    return profile.measured is None or profile.measured.machine == machine.identity()


def machine_profile(cache_dir: str | None, ranks: int | None = None) -> RigProfile | None:
    """The profile measured on this machine (see ``measured_profile_path``); None without one, and
    where it cannot be read: no reason to stop a run.
    """
    path = measured_profile_path(cache_dir, ranks)
    try:
        profile = None if path is None else load_profile(path)
    except UserError:
        return None
    if profile is None or profile.measured is None or not is_here(profile):
        return None
    return profile


def changes(profile: RigProfile) -> list[str]:
    """A line for each difference from the time when ``profile`` was measured on this machine:
    cards, memory, versions.
    """
    if profile.measured is None:
        return []
    lines = []
    before = [(card.name, card.memory_bytes) for card in profile.cards]
    now = _cards_now(profile)
    if not _alike(before, now):
        lines.append(f"its cards were {_listed(before)}, now they are {_listed(now)}")
    had, has = profile.host.memory_bytes, psutil.virtual_memory().total
    if abs(has - had) > SAME * had:
        lines.append(f"the host had {had / GIB:.1f} GiB, now it has {has / GIB:.1f} GiB")
    versions = machine.versions()
    for name in WATCHED:
        was, is_now = profile.measured.versions.get(name), versions.get(name)
        if was != is_now:
            lines.append(f"{name} was {was or 'not there'}, now it is {is_now or 'not there'}")
    return lines


def _cards_now(profile: RigProfile) -> list[Kind]:
    """The cards of as many ranks now, as ``measure`` describes them."""
    ranks = len(profile.cards)
    if profile.cards[0].kind == "cpu":
        return [(machine.cpu_name(), psutil.virtual_memory().total // ranks)] * ranks
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return []
    cards = []
    for rank in range(ranks):
        device = torch.device("cuda", rank % count)
        properties = torch.cuda.get_device_properties(device)
        cards.append((properties.name, properties.total_memory // ranks_a_device(device, ranks)))
    return cards


def _alike(before: list[Kind], now: list[Kind]) -> bool:
    return len(before) == len(now) and all(
        was == is_now and abs(size - had) <= SAME * had
        for (was, had), (is_now, size) in zip(before, now, strict=True)
    )


def _listed(cards: list[Kind]) -> str:
    texts = [f"{name} ({size / GIB:.1f} GiB)" for name, size in cards]
    return ", ".join(texts) or "not there"
