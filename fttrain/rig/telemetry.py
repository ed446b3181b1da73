"""Samples of a card while it trains: power, temperature, clocks, throttling.

    sample  {"power_w": 341.2, "temperature_c": 78, "sm_clock_mhz": 1695, "memory_clock_mhz": 9501,
             "throttle_reasons": 4, "throttled": 0, "pcie_generation": 4, "pcie_width": 16}

``throttle_reasons`` are the driver's bits (nvml.h, nvmlClocksEventReason...), ``throttled`` whether
one of ``THROTTLES`` is among them. Figures that the driver does not provide are left out; a CPU has
none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pynvml
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.rig.card import handle_of
from fttrain.rig.nvml import ask
from fttrain.rig.profile import CardProfile
from fttrain.rig.profile_drift import machine_profile

GPU_SENSOR = pynvml.NVML_TEMPERATURE_GPU
# A card at its power limit (SwPowerCap) is recorded without a warning: it is at work. These are
# faults of cooling or supply.
THROTTLES = {
    pynvml.nvmlClocksEventReasonHwSlowdown: "the hardware slows it down",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "it is too hot",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "it is far too hot",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "its power supply asks for less",
}


def _slowed_by(card: Any) -> int:
    """Bits of ``THROTTLES`` and others; drivers before 535 have the older function only."""
    try:
        return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(card))
    except pynvml.NVMLError_FunctionNotFound:
        return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card))


FIGURES: dict[str, Callable[[Any], float]] = {  # name -> query of a card's handle
    "power_w": lambda card: pynvml.nvmlDeviceGetPowerUsage(card) / 1e3,
    "temperature_c": lambda card: pynvml.nvmlDeviceGetTemperature(card, GPU_SENSOR),
    "sm_clock_mhz": lambda card: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda card: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM),
    "throttle_reasons": _slowed_by,
    "throttled": lambda card: float(any(_slowed_by(card) & bit for bit in THROTTLES)),
    "pcie_generation": lambda card: pynvml.nvmlDeviceGetCurrPcieLinkGeneration(card),
    "pcie_width": lambda card: pynvml.nvmlDeviceGetCurrPcieLinkWidth(card),
}


def sample(device: torch.device) -> dict[str, float]:
    """The figures of this moment, by name; the call does not wait for the device."""
    card = handle_of(device)
    if card is None:
        return {}
    asked = {name: ask(partial(figure, card)) for name, figure in FIGURES.items()}
    return {name: value for name, value in asked.items() if value is not None}


def gather_samples(group: RankGroup) -> list[dict[str, float]]:
    """Every rank's ``sample``, by rank; [] for CPUs. Every rank calls it."""
    if group.device.type != "cuda":
        return []
    figures_now = sample(group.device)
    # Drivers may provide different figures; ranks exchange equally many all the same.
    ranks = group.gather([figures_now.get(name, math.nan) for name in FIGURES])
    named = [dict(zip(FIGURES, figures, strict=True)) for figures in ranks]
    return [{k: v for k, v in card.items() if not math.isnan(v)} for card in named]


class CardWatch:
    """Warnings of cards, each once: a throttled card, a link slower than measured."""

    def __init__(self, profiles: Sequence[CardProfile] = ()) -> None:
        """``profiles``: the cards as measured, by rank; (): not measured."""
        self._profiles = profiles
        self._reported: set[tuple[int, str]] = set()

    def look(self, cards: Sequence[Mapping[str, float]]) -> list[str]:
        """A line for each new problem in ``cards``, the samples by rank."""
        lines = []
        for rank, card in enumerate(cards):
            for kind, text in (("throttle", _throttle(card)), ("link", self._link(rank, card))):
                if text and (rank, kind) not in self._reported:
                    self._reported.add((rank, kind))
                    lines.append(f"the card of rank {rank} {text}")
        return lines

    def _link(self, rank: int, card: Mapping[str, float]) -> str:
        if rank >= len(self._profiles):
            return ""
        profile = self._profiles[rank]
        for name, before in (
            ("width", profile.pcie_width),
            ("generation", profile.pcie_generation),
        ):
            now = card.get(f"pcie_{name}")
            if before is not None and now is not None and now < before:
                return (
                    f"has a slower PCIe link than when it was measured: {name} {now:.0f}, it was "
                    f"{before}; `fttrain doctor` says more"
                )
        return ""


def card_watch(device: torch.device, cache_dir: str | None) -> CardWatch:
    """The watch of this machine's cards, with their measured profile where there is one.

    ``cache_dir``: of the profile, as frozen.cache_dir.
    """
    profile = machine_profile(cache_dir) if device.type == "cuda" else None
    return CardWatch(profile.cards if profile else ())


def _throttle(card: Mapping[str, float]) -> str:
    bits = int(card.get("throttle_reasons", 0))
    reasons = [text for bit, text in THROTTLES.items() if bits & bit]
    if not reasons:
        return ""
    at = [f"{card['temperature_c']:.0f} °C"] if "temperature_c" in card else []
    at += [f"{card['sm_clock_mhz']:.0f} MHz"] if "sm_clock_mhz" in card else []
    where = f" ({', '.join(at)})" if at else ""
    return f"throttles{where}: {', '.join(reasons)}"
