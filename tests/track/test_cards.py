"""How cards fared: in the report where there are any, and as charts of the tracker."""

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fttrain.track import Trackers, open_trackers, plots
from fttrain.track.base import TrackConfig
from fttrain.track.cards import read_cards
from fttrain.track.report import write_report


def card(power_w: float, throttled: float = 0.0, **more: float) -> dict[str, float]:
    return {"power_w": power_w, "temperature_c": power_w / 4, "throttled": throttled, **more}


SAMPLES = [
    (2, [card(300), card(310)]),
    (4, [card(320), card(200, 1.0)]),
    (6, [card(340), {"temperature_c": 70.0}]),
]


def a_run(folder: Path, samples: list[tuple[int, list[dict[str, float]]]]) -> Path:
    trackers = open_trackers(TrackConfig(memory_every=2), folder, 6)
    for step, cards in samples:
        trackers.log(step, {"loss": 4.0, "tokens_per_s": 1.0})
        trackers.log_memory(step, [{"host_resident_bytes": 1, "host_free_bytes": 2}] * 2, cards)
    trackers.finish()
    return folder / "memory.jsonl"


def test_the_report_draws_cards_and_crosses_where_one_throttled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: dict[str, Any] = {}
    save = plots.save

    def keep(figure: Any, path: Path) -> None:
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    assert read_cards(a_run(tmp_path, SAMPLES)) == SAMPLES
    text = write_report(tmp_path).read_text()
    assert (
        "## Cards over the steps\n\n![cards](plots/cards.png)\n\n"
        "- rank 0: at most 340 W, at most 85 °C\n"
        "- rank 1: at most 310 W, at most 78 °C, throttled in 1 of 3 samples"
    ) in text
    power, heat = (
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figures["cards.png"].axes
    )
    assert power["rank 0"] == ([2, 4, 6], [300, 320, 340])
    assert power["rank 1"][1][:2] == [310, 200], "of the last step nobody knows the power"
    assert heat["rank 1"] == ([2, 4, 6], [77.5, 50, 70])
    assert (power["rank 1 throttled"], heat["rank 1 throttled"]) == (([4], [200]), ([4], [50]))
    assert "rank 0 throttled" not in power
    with Image.open(tmp_path / "plots" / "cards.png") as image:
        image.load()


def test_a_run_without_cards_shows_none(tmp_path: Path) -> None:
    a_run(tmp_path, [(2, []), (4, [])])
    assert "Cards" not in write_report(tmp_path).read_text()
    assert not (tmp_path / "plots" / "cards.png").exists()


def test_lines_that_cannot_be_drawn_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    good = {"step": 4, "cards": [card(1.0)]}
    broken = [{"step": 1}, {"step": 2, "cards": [3]}, {"step": 3, "cards": [{"power_w": None}]}]
    others = [{"step": 5, "cards": [{}]}, {"step": 0, "cards": [card(1.0), card(2.0)]}]
    path.write_text("\n".join(json.dumps(line) for line in [*broken, good, *others]))
    assert read_cards(path) == [(4, [card(1.0)])]


class Chart:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.lines.append((step, dict(values)))

    def finish(self) -> None:
        """Nothing to give back."""


def test_charts_get_every_rank_s_figures_by_name_and_others_do_not() -> None:
    chart, other = Chart(), Chart()
    trackers = Trackers([other, chart], charts=[chart])
    trackers.log_memory(2, [{"device_used_bytes": 5}] * 2, [{"power_w": 300.0}, {"power_w": 1.5}])
    trackers.log_memory(4, [{"host_free_bytes": 7}])
    assert chart.lines == [
        (
            2,
            {
                "rank0/device_used_bytes": 5,
                "rank1/device_used_bytes": 5,
                "card0/power_w": 300.0,
                "card1/power_w": 1.5,
            },
        ),
        (4, {"rank0/host_free_bytes": 7}),
    ]
    assert other.lines == []


def test_they_reach_the_tracker_that_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a stand-in for the library."""
    logged: list[dict[str, Any]] = []

    class Run:
        def define_metric(self, name: str, **how: Any) -> None:
            """Of no interest."""

        def log(self, values: dict[str, Any]) -> None:
            logged.append(values)

        def finish(self, exit_code: int) -> None:
            """Nothing to give back."""

    stand_in: Any = types.ModuleType("wandb")
    stand_in.Settings, stand_in.init = lambda **settings: None, lambda **settings: Run()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    trackers = open_trackers(TrackConfig(kind="wandb", mode="offline"), tmp_path, 2)
    trackers.log(2, {"loss": 1.0})
    trackers.log_memory(2, [{"host_free_bytes": 7}], [{"power_w": 300.0}])
    trackers.finish()
    assert logged == [
        {"step": 2, "loss": 1.0},
        {"step": 2, "rank0/host_free_bytes": 7, "card0/power_w": 300.0},
    ]
