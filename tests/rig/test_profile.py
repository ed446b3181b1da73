"""Rig profiles: what is written comes back, bandwidth as nccl-tests has it, bad files refused."""

import json
from pathlib import Path

import pytest

from fttrain.rig.profile import (
    CardProfile,
    CopyRates,
    HostProfile,
    LinkProfile,
    LinkSample,
    Measured,
    RigProfile,
    algorithm_bytes_per_s,
    bus_bytes_per_s,
    load_profile,
)
from fttrain.util.errors import UserError

LINK = LinkProfile(
    "default", "NVLink", 2, {"all_gather": (LinkSample(1000, 1e-3), LinkSample(5000, 3e-3))}
)
PROFILE = RigProfile(
    "test",
    (CardProfile("card", "cuda", 24 << 30, 7.1e13, to_card=CopyRates(1.2e10), pcie_width=8),) * 2,
    HostProfile("cpu", 16, 64 << 30, disk_bytes_per_s=3e9),
    (LINK, LinkProfile("gloo", "TCP", 2, {}, wrong="rank 1: one value differs")),
    Measured("2026-11-25T12:00:00Z", "0123", {"torch": "2.13.0"}),
    {"price_per_h": "somewhere"},
)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == PROFILE


@pytest.mark.parametrize(
    ("collective", "ranks", "factor"),  # nccl-tests, doc/PERFORMANCE.md
    [
        ("all_reduce", 2, 1.0),
        ("all_reduce", 4, 1.5),
        ("all_gather", 4, 0.75),
        ("reduce_scatter", 8, 0.875),
        ("broadcast", 8, 1.0),
        ("send_recv", 2, 1.0),
    ],
)
def test_bus_bandwidth(collective: str, ranks: int, factor: float) -> None:
    sample = LinkSample(1 << 30, 0.5)
    assert algorithm_bytes_per_s(sample) == 2 << 30
    assert bus_bytes_per_s(collective, sample, ranks) == pytest.approx(factor * (2 << 30))


@pytest.mark.parametrize(
    ("size_bytes", "seconds"),
    [(10, 1e-3), (1000, 1e-3), (3000, 2e-3), (5000, 3e-3), (50000, 3e-2)],
)
def test_seconds_between_and_beyond_what_was_measured(size_bytes: int, seconds: float) -> None:
    assert LINK.seconds("all_gather", size_bytes) == pytest.approx(seconds)


def test_what_was_not_measured_is_said() -> None:
    with pytest.raises(UserError, match="link default: broadcast was not measured"):
        LINK.seconds("broadcast", 10)
    assert PROFILE.link() is LINK
    with pytest.raises(UserError, match="no link gloo; there are: default, gloo"):
        PROFILE.link("gloo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(form=0), "of another version"),
        (lambda c: c.pop("cards"), "KeyError"),
        (lambda c: c["host"].update(colour="red"), "colour"),
        (lambda c: c["links"][0]["samples"].update(gossip=[]), "gossip is no collective"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_profile(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"`fttrain measure` makes one"):
        load_profile(path)
    path.unlink()
    with pytest.raises(UserError, match="no rig profile is there"):
        load_profile(path)
