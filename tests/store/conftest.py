"""Shared by the tests of stores."""

import pytest
import tiny_store


@pytest.fixture
def late_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of side streams starts late, by a random time."""
    for kind in (tiny_store.ThreadLane, tiny_store.CollectiveLane):
        monkeypatch.setattr(kind, "_start", kind._start)  # put back after the test
    tiny_store.delay_lanes(seed=1)
