"""Sweeps whose trials are quick, in this process or in one that can be hit by a signal."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tiny_sweep import BASE, hurry, sweep_main


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of this process are quick."""
    hurry(monkeypatch.setattr)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., BaseProcess]]:
    """Starts a sweep in a process of its own; what it says goes to ``said``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fttrain.train", "fttrain.cli.train", "fttrain.cli.sweep"])
    processes: list[BaseProcess] = []

    def start(output: Path, *more: str, base: Sequence[str] = BASE) -> BaseProcess:
        argv, said = [*base, f"output={output}", *more], tmp_path / "said"
        processes.append(context.Process(target=sweep_main, args=(argv, said, base is BASE)))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()
