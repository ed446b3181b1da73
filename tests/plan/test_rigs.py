"""The rig that is planned for: every shipped one is whole, others are refused by name."""

from pathlib import Path

import pytest

from fttrain.errors import UserError
from fttrain.plan.rigs import find_rig, shipped


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
    with pytest.raises(UserError, match="`fttrain measure` makes it"):
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
