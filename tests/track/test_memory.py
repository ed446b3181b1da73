"""memory.json and memory.jsonl in the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from fttrain.track import TrackConfig, open_trackers, plots
from fttrain.track.memory import memory_section, read_samples
from fttrain.util.errors import UserError

GIB = 1024**3


def use(part: str, device: float, host: float) -> dict[str, object]:
    return {"part": part, "device_bytes": int(device * GIB), "host_bytes": int(host * GIB)}


def test_parts_of_all_ranks_stand_side_by_side(tmp_path: Path) -> None:
    ranks = [[use("layers", 2, 0), use("head", 0, 0.5)], [use("layers", 1.25, 0)]]
    path = tmp_path / "memory.json"
    path.write_text(json.dumps({"step": 1, "ranks": ranks}))
    assert memory_section(path) == (
        "## Memory in step 1, GiB\n\n"
        "| part | rank 0, device | rank 0, host | rank 1, device | rank 1, host |\n"
        "|---|---|---|---|---|\n"
        "| layers | 2.00 |  | 1.25 |  |\n"
        "| head |  | 0.50 |  |  |"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"step": 1, "ranks": [3]}'])
def test_what_is_not_whole_is_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(text)
    assert memory_section(tmp_path / "memory.json") is None
    assert memory_section(tmp_path / "none.json") is None


def sampled(step: int, *resident: int, **device: int) -> dict[str, Any]:
    """A line of memory.jsonl: of each rank what is resident, and of all the same otherwise."""
    others = {"host_free_bytes": 9 * GIB, **device}
    return {"step": step, "ranks": [{"host_resident_bytes": size, **others} for size in resident]}


def test_lines_go_on_after_a_resume_and_can_be_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"

    def start(every: int, resumed_step: int, *steps: int) -> list[int]:
        trackers = open_trackers(TrackConfig(memory_every=every), tmp_path, 9, resumed_step)
        for step in steps:
            trackers.log_memory(step, sampled(step, 5, 6)["ranks"])
        trackers.finish()
        return [step for step, _ in read_samples(path)]

    assert start(0, 0) == []
    assert not path.exists()
    assert start(2, 0, 2, 4, 6) == [2, 4, 6]
    assert json.loads(path.read_text().splitlines()[2]) == sampled(6, 5, 6)
    assert start(2, 5, 6, 8) == [2, 4, 6, 8]
    assert start(0, 4) == [2, 4], "of what did not happen nothing stays"
    assert start(2, 0) == []


def test_what_cards_say_stands_beside_and_changes_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    trackers = open_trackers(TrackConfig(memory_every=1), tmp_path, 9)
    cards = [{"power_w": 341.5, "throttle_reasons": 4.0}]
    trackers.log_memory(1, sampled(1, 5)["ranks"], cards)
    trackers.log_memory(2, sampled(2, 6)["ranks"])
    trackers.finish()
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == sampled(1, 5) | {"cards": cards}
    assert second == sampled(2, 6), "of CPUs there is nothing to say"
    assert [step for step, _ in read_samples(path)] == [1, 2]


def test_samples_that_cannot_be_drawn_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    assert read_samples(path) == []
    alone, *both = sampled(1, 7), sampled(2, 8, 9), sampled(4, 5, 6)
    broken = [{"step": 3}, {"step": 5, "ranks": [3]}, {"step": 6, "ranks": [{"host": None}]}]
    lines = [json.dumps(line) for line in [alone, both[0], *broken, both[1]]]
    path.write_text("\n".join(lines) + '\n{"step": 7, "ra')
    assert read_samples(path) == [(line["step"], line["ranks"]) for line in both]


@pytest.mark.parametrize("card", [False, True])
def test_the_plot_shows_every_rank_and_the_size_of_the_card(
    card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda *both: (figures.append(both[0]), save(*both)))
    sizes = {"device_peak_bytes": 11, "device_used_bytes": 13, "device_total_bytes": 24}
    device = {name: size * GIB for name, size in sizes.items()} if card else {}
    lines = [sampled(step, step * GIB, 3 * GIB, **device) for step in (2, 4, 6)]
    plots.plot_memory(tmp_path / "plot.png", [(line["step"], line["ranks"]) for line in lines])
    drawn = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figures[0].axes
    ]
    steps = [2, 4, 6]
    if card:
        assert drawn.pop(0) == {
            "rank 0: peak of the allocator": (steps, [11] * 3),
            "rank 0: card, all programs": (steps, [13] * 3),
            "rank 1: peak of the allocator": (steps, [11] * 3),
            "rank 1: card, all programs": (steps, [13] * 3),
            "size of a card": ([0, 1], [24, 24]),  # x: from edge to edge
        }
    assert drawn == [
        {
            "rank 0: resident": (steps, [2, 4, 6]),
            "rank 0: still free on its machine": (steps, [9] * 3),
            "rank 1: resident": (steps, [3] * 3),
            "rank 1: still free on its machine": (steps, [9] * 3),
        }
    ]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(UserError, match=r"track\.memory_every=-1: a number of steps, or 0"):
        TrackConfig(memory_every=-1)
