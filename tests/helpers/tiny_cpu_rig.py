"""A made-up rig of CPU ranks, to plan tiny models for."""

from pathlib import Path

from fttrain.rig.profile import CardProfile, HostProfile, LinkProfile, LinkSample, RigProfile

ROOMY = 1 << 40


def rig(
    cards: int = 1,
    memory_bytes: int = ROOMY,
    sums_bytes_per_s: float = 1e9,
    overhead_bytes: int | None = 1000,
) -> RigProfile:
    """``memory_bytes``: of each rank's share of the host; ``sums_bytes_per_s``: of all_reduce, what
    else goes over the link is fast.
    """
    card = CardProfile("core", "cpu", memory_bytes, 1e10, 1e10, 1e10, overhead_bytes=overhead_bytes)
    rates = {"all_reduce": sums_bytes_per_s, "all_gather": 1e9, "send_recv": 1e9}
    samples = {
        name: (LinkSample(1, 1 / rate), LinkSample(10**9, 1e9 / rate))
        for name, rate in rates.items()
    }
    host = HostProfile("cpu", 8, cards * memory_bytes, adamw_values_per_s=1e9)
    return RigProfile("made up", (card,) * cards, host, (LinkProfile("gloo", "?", cards, samples),))


def saved(folder: Path, profile: RigProfile) -> str:
    """The setting that names ``profile``, written into ``folder``."""
    path = folder / "made-up.json"
    profile.save(path)
    return f"rig.profile={path}"
