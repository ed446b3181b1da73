"""What a card says of itself while it trains, and what is worth a warning."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pynvml
import pytest
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.rig import nvml, telemetry
from fttrain.rig.machine import identity
from fttrain.rig.profile import CardProfile, HostProfile, Measured, RigProfile, profile_path
from fttrain.rig.telemetry import CardWatch

CARD = CardProfile("RTX 3090", "cuda", 24 << 30, pcie_generation=4, pcie_width=16)
MEASURED = Measured("2026-11-25T12:00:00Z", identity(), {})
PROFILE = RigProfile("rig", (CARD, CARD), HostProfile("cpu", 16, 64 << 30), measured=MEASURED)
COOL = {"throttle_reasons": 0, "pcie_generation": 4, "pcie_width": 16}
HOT = COOL | {
    "throttle_reasons": pynvml.nvmlClocksEventReasonHwThermalSlowdown
    | pynvml.nvmlClocksEventReasonSwPowerCap,
    "temperature_c": 97.0,
    "sm_clock_mhz": 705.0,
}


def test_of_a_cpu_nothing_is_known() -> None:
    assert telemetry.sample(torch.device("cpu")) == {}


def test_without_a_driver_nothing_is_known() -> None:
    """The real library on a machine that has none, or one whose card has no such number."""
    assert nvml.ask(lambda: pynvml.nvmlDeviceGetHandleByIndex(10_000)) is None


class Driver:
    """The driver of one card, which nobody here has. It does not know the memory's clock."""

    answers: ClassVar[dict[str, Any]] = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByUUID": "card",
        "nvmlDeviceGetPowerUsage": 341_200,  # mW
        "nvmlDeviceGetTemperature": 78,
        "nvmlDeviceGetCurrentClocksEventReasons": 4,
        "nvmlDeviceGetCurrPcieLinkGeneration": 4,
        "nvmlDeviceGetCurrPcieLinkWidth": 8,
    }

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, answer in self.answers.items():
            monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", self._clock)
        properties = type("Properties", (), {"uuid": "1234"})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    @staticmethod
    def _clock(card: str, which: int) -> int:
        if which != pynvml.NVML_CLOCK_SM:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 1695


def test_figures_have_their_units_and_unknown_ones_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Driver(monkeypatch)
    assert telemetry.sample(torch.device("cuda", 0)) == {
        "power_w": 341.2,
        "temperature_c": 78,
        "sm_clock_mhz": 1695,
        "throttle_reasons": 4,  # its power limit
        "throttled": 0,
        "pcie_generation": 4,
        "pcie_width": 8,
    }
    hot = pynvml.nvmlClocksEventReasonHwThermalSlowdown | 4
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", lambda card: hot)
    assert telemetry.sample(torch.device("cuda", 0))["throttled"] == 1


def test_an_older_driver_knows_the_reasons_by_their_older_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(card: str) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    Driver(monkeypatch)
    hot = pynvml.nvmlClocksEventReasonHwThermalSlowdown
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", unknown)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda card: hot)
    assert telemetry.sample(torch.device("cuda", 0))["throttle_reasons"] == hot


def test_a_card_that_throttles_is_named_once() -> None:
    watch = CardWatch()
    capped = COOL | {"throttle_reasons": pynvml.nvmlClocksEventReasonSwPowerCap}
    assert watch.look([COOL, capped]) == [], "at its power limit a card is at work"
    assert watch.look([COOL, HOT]) == [
        "the card of rank 1 throttles (97 °C, 705 MHz): it is far too hot"
    ]
    assert watch.look([COOL, HOT]) == []
    assert len(watch.look([HOT, HOT])) == 1, "another card is another matter"
    assert watch.look([{}, {}]) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [({"pcie_width": 8}, "width 8, it was 16"), ({"pcie_generation": 1}, "generation 1, it was 4")],
)
def test_a_link_that_is_slower_than_measured_is_named_once(change: dict, text: str) -> None:
    watch = CardWatch(PROFILE.cards)
    assert watch.look([COOL, COOL]) == []
    (line,) = watch.look([COOL | change, COOL])
    assert line.startswith("the card of rank 0 has a slower PCIe link")
    assert text in line
    assert watch.look([COOL | change, COOL]) == []
    assert CardWatch().look([COOL | change]) == [], "nobody measured it"


class CardGroup(RankGroup):
    """Rank 0 of two; the other one's driver knows all but the power."""

    def gather(self, values: list[float]) -> list[list[float]]:
        return [values, [math.nan, *range(1, len(values))]]


def test_ranks_gather_what_each_driver_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    own, other = telemetry.gather_samples(CardGroup(0, 2, 0, cuda))
    assert own == telemetry.sample(cuda)
    assert list(other) == [name for name in telemetry.FIGURES if name != "power_w"]
    assert telemetry.gather_samples(CardGroup(0, 2, 0, cpu)) == []


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, 1),
        ({"measured": None}, 0),
        ({"measured": Measured("2026-11-25T12:00:00Z", "another", {})}, 0),
    ],
)
def test_cards_are_compared_with_their_own_measured_profile(
    change: dict[str, Any], lines: int, tmp_path: Path
) -> None:
    """Not with a shipped one, nor with that of another machine."""
    replace(PROFILE, **change).save(profile_path(2, str(tmp_path)))
    watch = telemetry.card_watch(torch.device("cuda", 0), str(tmp_path))
    assert len(watch.look([COOL | {"pcie_width": 8}, COOL])) == lines


@pytest.mark.parametrize("text", ["", "{"])
def test_no_profile_and_a_broken_one_stop_nobody(text: str, tmp_path: Path) -> None:
    if text:
        profile_path(2, str(tmp_path)).write_text(text)
    watch = telemetry.card_watch(torch.device("cuda", 0), str(tmp_path))
    assert watch.look([COOL | {"pcie_width": 8}]) == []


@pytest.mark.cuda
def test_a_card_answers_and_waits_for_nothing() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    telemetry.sample(device)
    torch.cuda._sleep(10**9)  # cycles: about half a second
    done = torch.cuda.Event()
    done.record()
    found = telemetry.sample(device)
    assert not done.query(), "the device was still at work"
    assert 0 < found["temperature_c"] < 120
    assert found["pcie_width"] >= 1
