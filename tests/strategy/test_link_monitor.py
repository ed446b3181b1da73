"""A link that slows against the profile: rates are given, what is waited is what a step says."""

from pathlib import Path

import pytest
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.rig import machine
from fttrain.rig.profile import (
    CardProfile,
    CopyRates,
    HostProfile,
    LinkProfile,
    LinkSample,
    Measured,
    RigProfile,
    profile_path,
)
from fttrain.store import Traffic
from fttrain.strategy.link_monitor import LinkMonitor, link_monitor

# Gathers 1 GB in 0.5 s, of which a rank receives half: 1 GB/s; copies 2 GB/s.
LINK = LinkProfile("default", "P2P", 2, {"all_gather": (LinkSample(10**9, 0.5),)})
CARD = CardProfile("card", "cuda", 24 << 30, to_card=CopyRates(2e9))
MEASURED = Measured("2026-11-25T12:00:00Z", machine.identity(), {})
PROFILE = RigProfile("rig", (CARD, CARD), HostProfile("cpu", 8, 64 << 30), (LINK,), MEASURED)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Pair(RankGroup):
    """Rank 0 of two; the other one waited ``other`` times what it should."""

    other = 0.0

    def gather(self, values: list[float]) -> list[list[float]]:
        return [values, [self.other, *values[1:]]]


def pair(other: float) -> Pair:
    made = Pair(0, 2, 0, CUDA)
    object.__setattr__(made, "other", other)
    return made


def said(traffic: Traffic, others: list[float]) -> list[bool]:
    watch = LinkMonitor(PROFILE)
    return [bool(watch.look(pair(other), traffic)) for other in others]


SLOW = Traffic(gather_bytes=10**9, wait_s=2.1)  # twice the whole gather would be 2 s


def test_a_gather_that_takes_twice_as_long_is_said_once_after_three_samples() -> None:
    assert said(SLOW, [2.5, 2.5, 2.5, 2.5, 2.5, 2.5]) == [False, False, True, False, False, False]
    assert said(SLOW, [2.5, 2.5, 1.9, 2.5, 2.5, 2.5]) == [False] * 5 + [True], "three in a row"
    assert not any(said(Traffic(gather_bytes=10**9, wait_s=1.9), [2.5] * 5))
    told = [LinkMonitor(PROFILE), ""]
    for _ in range(3):
        told[1] = told[0].look(pair(3.0), SLOW)  # type: ignore[attr-defined]
    assert "now 2.1 times as long as bringing all of them took" in str(told[1])


def test_a_peer_that_comes_late_is_no_slow_link() -> None:
    assert not any(said(SLOW, [0.1] * 5)), "it waits for nobody itself"


def test_what_comes_from_the_host_counts_at_its_own_rate() -> None:
    copied = Traffic(h2d_bytes=10**9, activation_bytes=10**9, wait_s=2.1)  # 1 s
    assert said(copied, [0.1] * 3)[-1], "copies of a rank wait for no other"
    both = Traffic(gather_bytes=10**9, h2d_bytes=10**9, wait_s=2.1)  # 1.5 s
    assert not any(said(both, [3.0] * 5))


@pytest.mark.parametrize(
    ("profile", "traffic"),
    [
        (None, SLOW),
        (PROFILE, Traffic(stage_bytes=1, wait_s=9.0)),  # a pipeline's bubble
        (RigProfile("no links", (CARD, CARD), PROFILE.host), SLOW),
        (PROFILE, Traffic(wait_s=9.0)),
    ],
)
def test_where_nobody_knows_nothing_is_said(profile: RigProfile | None, traffic: Traffic) -> None:
    assert LinkMonitor(profile).expected_s(0, traffic) == 0.0


def test_it_knows_the_profile_of_as_many_ranks_on_such_devices(tmp_path: Path) -> None:
    PROFILE.save(profile_path(2, str(tmp_path)))

    def expected_s(ranks: int, device: torch.device) -> float:
        watch = link_monitor(RankGroup(0, ranks, 0, device), str(tmp_path))
        return watch.expected_s(0, SLOW)

    assert expected_s(2, CUDA) == pytest.approx(1.0)
    assert expected_s(2, CPU) == expected_s(4, CUDA) == 0.0
