"""Sweeps whose trials are quick, in this process or in one that can be hit by a signal."""

from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import processes
import pytest
from tiny_sweep import BASE, hurry, sweep_main


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of this process are quick."""
    hurry(monkeypatch.setattr)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., BaseProcess]]:
    """Starts a sweep in a process of its own; what it says goes to ``said``."""
    running: list[BaseProcess] = []

    def start(output: Path, *more: str, base: Sequence[str] = BASE) -> BaseProcess:
        argv, said = [*base, f"output={output}", *more], tmp_path / "said"
        running.append(processes.start(sweep_main, argv, said, base is BASE))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.join()
