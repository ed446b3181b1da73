"""Cards as a driver would describe them: nobody here has one."""

from dataclasses import replace

import pytest

from fttrain.doctor import cards
from fttrain.doctor.cards import Card
from fttrain.doctor.finding import FAILURE, OK, WARNING

GOOD = Card("RTX 3090", 24 << 30, 16, 16, 4, 350.0, 350.0, False, 0, "GPU-good")
UNKNOWN = Card("RTX 3090", 24 << 30)


@pytest.mark.parametrize(
    ("check", "change", "verdict", "text"),
    [
        (cards.pcie, {"pcie_width": 4}, WARNING, "card 1: x4 of x16"),
        (cards.power, {"power_limit_w": 220.0}, WARNING, "card 1: 220 of 350 W"),
        (cards.ecc, {"ecc": True, "ecc_errors": 3}, FAILURE, "card 1: 3 uncorrected errors"),
    ],
)
def test_what_one_card_lacks(check, change: dict, verdict: str, text: str) -> None:
    assert check([GOOD, GOOD]).verdict == OK
    found = check([GOOD, replace(GOOD, **change)])
    assert found.verdict == verdict
    assert text in found.figure
    assert found.remedy
    for nothing in ([], [UNKNOWN]):
        assert (check(nothing).verdict, check(nothing).figure) == (OK, "not available")


@pytest.mark.parametrize(
    ("check", "change"),
    [(cards.power, {"power_limit_w": 220.0}), (cards.ecc, {"ecc": True, "ecc_errors": 3})],
)
def test_what_mends_a_card_names_it_as_nvidia_smi_finds_it(check, change: dict) -> None:
    """torch's numbers are nvidia-smi's only in PCI order, with all cards visible."""
    found = check([GOOD, replace(GOOD, uuid="GPU-bad", **change)])
    assert "-i GPU-bad" in found.remedy


def test_the_cards_are_listed() -> None:
    assert cards.listing([GOOD]).figure == "0: RTX 3090, 24.00 GiB"
    assert "no GPU" in cards.listing([]).figure


def test_host_memory_against_the_cards() -> None:
    assert cards.host_memory([GOOD, GOOD], 96 << 30).verdict == OK
    assert cards.host_memory([GOOD, GOOD], (96 << 30) - 1).verdict == WARNING
    assert cards.host_memory([], 1 << 30).verdict == OK


@pytest.mark.parametrize(
    ("value", "fit", "count", "verdict"),
    [
        (None, True, 2, OK),
        (None, False, 2, WARNING),
        ("1", True, 2, WARNING),
        ("0", False, 2, OK),
        ("1", True, 1, OK),
    ],
)
def test_accelerates_habit(
    value: str | None, fit: bool, count: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", value)
    assert cards.accelerate_habit([GOOD] * count, fit).verdict == verdict
