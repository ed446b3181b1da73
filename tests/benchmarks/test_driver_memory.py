"""Card memory as the driver counts it: the peak while a block runs; nothing where it is mute."""

import importlib
import os
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("harness.driver_memory")


def test_a_peak_between_begin_and_end_is_seen(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[int] = []

    def processes(_handle: object) -> list[SimpleNamespace]:
        samples.append(7 if len(samples) == 1 else 2)
        own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=samples[-1])
        return [SimpleNamespace(pid=1, usedGpuMemory=70), own]

    nvml = SimpleNamespace(
        NVMLError=module.pynvml.NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda _handle: SimpleNamespace(used=90),
        nvmlDeviceGetComputeRunningProcesses=processes,
    )
    monkeypatch.setattr(module, "pynvml", nvml)
    monkeypatch.setattr(module, "POLL_S", 0.001)
    with module.DriverMemory("card") as memory:
        deadline = time.monotonic() + 30
        while len(samples) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert (memory.own_bytes, memory.card_bytes) == (7, 90)
    after = len(samples)
    time.sleep(0.02)
    assert len(samples) == after  # the thread has ended


def test_a_driver_that_does_not_answer_is_no_figure(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise module.pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(module.pynvml, "nvmlInit", absent)
    with module.DriverMemory("card") as memory:
        pass
    assert (memory.own_bytes, memory.card_bytes) == (None, None)
