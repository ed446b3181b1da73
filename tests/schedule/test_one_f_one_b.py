"""1F1B's order, as Narayanan et al. 2021 draw it, and the bound that is its point."""

import pytest

from fttrain.schedule.one_f_one_b import in_flight, one_f_one_b


def order(stage: int, stages: int, micro_batches: int) -> list[str]:
    log: list[str] = []
    one_f_one_b(
        stage,
        stages,
        micro_batches,
        lambda number: log.append(f"F{number}"),
        lambda number: log.append(f"B{number}"),
    )
    return log


@pytest.mark.parametrize(
    ("stage", "stages", "expected"),
    [
        (0, 1, "F0 B0 F1 B1 F2 B2 F3 B3"),
        (0, 2, "F0 F1 B0 F2 B1 F3 B2 B3"),
        (1, 2, "F0 B0 F1 B1 F2 B2 F3 B3"),
        (0, 4, "F0 F1 F2 F3 B0 B1 B2 B3"),
        (1, 4, "F0 F1 F2 B0 F3 B1 B2 B3"),
        (2, 4, "F0 F1 B0 F2 B1 F3 B2 B3"),
        (3, 4, "F0 B0 F1 B1 F2 B2 F3 B3"),
    ],
)
def test_order_of_four_micro_batches(stage: int, stages: int, expected: str) -> None:
    assert order(stage, stages, 4) == expected.split()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [0, 1, 2, 3, 5, 9])
def test_each_passes_once_in_order_and_few_are_under_way(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        log = order(stage, stages, micro_batches)
        for kind in "FB":
            mine = [entry for entry in log if entry[0] == kind]
            assert mine == [f"{kind}{number}" for number in range(micro_batches)]
        under_way = most = 0
        for entry in log:
            under_way += 1 if entry[0] == "F" else -1
            most = max(most, under_way)
        assert most == min(micro_batches, in_flight(stage, stages))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 9])
def test_stages_never_wait_for_each_other_in_a_circle(stages: int, micro_batches: int) -> None:
    """A forward waits for that of the stage before, a backward for that of the stage after."""
    logs = [order(stage, stages, micro_batches) for stage in range(stages)]
    done: set[tuple[int, str]] = set()
    while any(logs):
        ready = [
            stage for stage, log in enumerate(logs) if log and _ready(log[0], stage, stages, done)
        ]
        assert ready, logs
        for stage in ready:
            done.add((stage, logs[stage].pop(0)))


def _ready(entry: str, stage: int, stages: int, done: set[tuple[int, str]]) -> bool:
    before = stage - 1 if entry[0] == "F" else stage + 1
    return before in (-1, stages) or (before, entry) in done
