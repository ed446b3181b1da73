"""How often work is repeated, and what is not counted."""

import pytest
import torch

from fttrain.rig import timing


@pytest.mark.parametrize(("device", "more"), [("cpu", 0), ("cuda", 1)])
def test_the_start_of_a_library_leaves_a_card_its_repetitions(
    device: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run takes long: on a card that says nothing of the others."""
    runs: list[float] = []

    def elapsed_s(work: object, device: torch.device) -> float:
        runs.append(0.001 if runs else 10.0)
        return runs[-1]

    monkeypatch.setattr(timing, "elapsed_s", elapsed_s)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    assert timing.median_s(lambda: None, torch.device(device)) == 0.001
    assert len(runs) == 1 + more + (timing.MOST if device == "cuda" else timing.LEAST)


@pytest.mark.cuda
def test_a_card_is_warm_and_its_own_clock_counts() -> None:
    device = torch.device("cuda", 0)
    cycles = 10_000_000  # 5 to 50 ms, as the clock is
    first = timing.median_s(lambda: torch.cuda._sleep(cycles), device)
    second = timing.median_s(lambda: torch.cuda._sleep(cycles), device)
    assert 0.001 < second < 0.1
    assert first == pytest.approx(second, rel=0.2)
