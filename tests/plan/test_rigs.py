"""The rig that is planned for: every shipped one is whole, others are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fttrain.plan.rigs import find_rig, shipped
from fttrain.rig import machine
from fttrain.rig.profile import CardProfile, Measured, RigProfile, profile_path
from fttrain.util.errors import UserError


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_rig_is_whole_and_says_where_its_figures_are_from(name: str) -> None:
    rig = find_rig(name)
    assert rig.name == name
    assert rig.measured is None
    for figure in ("gemm_flop_per_s", "memory_bytes", "memory_bytes_per_s", "overhead_bytes"):
        assert getattr(rig.cards[0], figure)
        assert rig.sources[f"cards.{figure}"]
    assert rig.cards[0].to_card.pinned_bytes_per_s
    assert rig.sources["cards.to_card"]
    if len(rig.cards) > 1:
        assert rig.link().seconds("all_gather", 1 << 20) > 0
        assert rig.sources["links"]


def test_the_rigs_that_are_shipped() -> None:
    pairs = {"2x3090_nvlink", "2x3090_pcie4x8", "2x4090", "2x5090"}
    assert {*pairs, "one_24gb", "one_16gb"} == set(shipped())


def test_nvlink_is_the_faster_link() -> None:
    fast, slow = (find_rig(name).link() for name in ("2x3090_nvlink", "2x3090_pcie4x8"))
    ratio = slow.seconds("all_gather", 441e6) / fast.seconds("all_gather", 441e6)
    assert ratio == pytest.approx(56 / 12)


def test_a_measured_rig_is_that_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="`fttrain measure` does it"):
        find_rig("measured")
    (tmp_path / "fttrain").mkdir()
    find_rig("2x4090").save(tmp_path / "fttrain" / "rig.json")
    assert find_rig("measured") == find_rig("2x4090")
    assert find_rig(str(tmp_path / "fttrain" / "rig.json")) == find_rig("2x4090")


@pytest.mark.parametrize(
    ("name", "told"), [("2x3090_nvlin", "did you mean 2x3090_nvlink"), ("none.json", "no rig prof")]
)
def test_an_unknown_rig_is_refused(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        find_rig(name)


def measured_here(folder: Path, ranks: int) -> Path:
    """A profile of CPU ranks of this machine as `fttrain measure` leaves it, without rates."""
    card = CardProfile(machine.cpu_name(), "cpu", psutil.virtual_memory().total // ranks)
    made = Measured("2026-11-25T12:00:00+00:00", machine.identity(), machine.versions())
    path = profile_path(ranks, str(folder))
    RigProfile(f"{ranks}x CPU", (card,) * ranks, machine.host(), measured=made).save(path)
    return path


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_single_rank_replaces_no_profile_of_two(tmp_path: Path) -> None:
    told: list[str] = []

    def names(*ranks: int | None) -> list[str]:
        return [find_rig("measured", str(tmp_path), r, told.append).name for r in ranks]

    measured_here(tmp_path, 2)
    measured_here(tmp_path, 1)
    assert names(None, 1, 2) == ["2x CPU", "1x CPU", "2x CPU"]
    assert told == []
    assert names(4) == ["2x CPU"]
    assert told[0].startswith("rig 2x CPU was measured with 2 ranks, launch= has 4")
    # A file without a number is read where there is no other.
    profile_path(1, str(tmp_path)).rename(tmp_path / "rig.json")
    assert names(1) == ["2x CPU"]
    profile_path(2, str(tmp_path)).unlink()
    assert names(1, None) == ["1x CPU", "1x CPU"]


def test_another_machine_s_profile_is_taken_on_purpose_alone(tmp_path: Path) -> None:
    path = measured_here(tmp_path, 2)
    edit(path, lambda c: c["measured"].update(machine="0123abcd"))
    with pytest.raises(UserError) as refused:
        find_rig("measured", str(tmp_path))
    for part in (str(path), "0123abcd", machine.identity(), "`fttrain measure`", "rig.profile="):
        assert part in str(refused.value)
    told: list[str] = []
    assert find_rig(str(path), warn=told.append).name == "2x CPU"
    assert told == ["rig 2x CPU: measured on another machine, 2026-11-25T12:00:00+00:00"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c["cards"][1].update(name="RTX 3090"), "its cards were "),
        (lambda c: c["cards"][0].update(memory_bytes=24 << 30), "its cards were "),
        # Cards that nobody has: no GPU has that name
        (lambda c: [card.update(kind="cuda", name="none") for card in c["cards"]], "now they are "),
        (lambda c: c["host"].update(memory_bytes=1 << 40), "the host had 1024.0 GiB, now it has "),
        (lambda c: c["measured"]["versions"].update(torch="1.0"), "torch was 1.0, now it is "),
        (lambda c: c["measured"]["versions"].update(driver="1"), "driver was 1, now it is "),
    ],
)
def test_what_has_changed_since_is_said(
    change: Callable[[Any], object], line: str, tmp_path: Path
) -> None:
    path = measured_here(tmp_path, 2)
    edit(path, change)
    for profile in ("measured", str(path)):
        told: list[str] = []
        find_rig(profile, str(tmp_path), warn=told.append)
        assert len(told) == 1
        assert line in told[0]
        assert "`fttrain measure` measures it anew" in told[0]
