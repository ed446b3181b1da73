"""Shared by the tests of stores."""

import pytest
import tiny_store


@pytest.fixture
def late_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the tasks of side streams late, by a random time."""
    for kind in (tiny_store.ThreadSideStream, tiny_store.CollectiveSideStream):
        monkeypatch.setattr(kind, "_start", kind._start)  # put back after the test
    tiny_store.delay_streams(seed=1)
