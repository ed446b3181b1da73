"""Memory that is page-locked, or cannot be."""

import resource
import warnings

import pytest
import torch

from fttrain.doctor import locked
from fttrain.doctor.finding import OK, WARNING


def test_memory_that_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, speak: bool) -> None:
        warnings.warn("a buffer: 1.00 GiB could not be page-locked", stacklevel=1)

    monkeypatch.setattr(locked.HostBuffer, "page_lock", refused)
    found = locked.locked_memory(torch.device("cuda", 0))
    assert found.verdict == WARNING
    assert "could not be page-locked" in found.figure
    assert locked.locked_memory(torch.device("cpu")).verdict == OK


@pytest.mark.cuda
def test_memory_is_locked_beyond_the_limit_of_the_shell() -> None:
    """NVIDIA's driver does not ask for RLIMIT_MEMLOCK, on most machines 64 KiB or 8 MiB."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, before[1]))
    try:
        found = locked.locked_memory(torch.device("cuda", 0))
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    assert found.verdict == OK, found
    assert "1.00 GiB page-locked" in found.figure
