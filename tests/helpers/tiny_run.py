"""``fttrain train`` on a tiny model, and two ranks of it that can be hit by a signal."""

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import processes
import pytest
import short_memory
import tiny
import tiny_files
import torch
from ranks import become_rank
from safetensors.torch import load_file

from fttrain.cli import main
from fttrain.data.batch import MicroBatch
from fttrain.data.loader import Loader
from fttrain.launcher.launch import free_port
from fttrain.track import read_metrics

WAIT_S = 300


def inputs(factory: pytest.TempPathFactory, layers: int = 2) -> Path:
    """The folder of a tiny Llama with its tokenizer, and of a data set."""
    place = factory.mktemp("inputs")
    tiny_files.save(tiny.model(num_hidden_layers=layers), place / "model")
    tiny_files.write_data(place / "data.jsonl")
    return place


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    """``fttrain train`` on one rank, with dropout and shuffling on, in fp32."""
    return [
        "train",
        "model=local",
        f"model.path={folder / 'model'}",
        "model.dtype=float32",
        "data=file",
        f"data.path={folder / 'data.jsonl'}",
        "data.seq_len=96",
        f"data.cache_dir={folder / 'cache'}",
        f"frozen.cache_dir={folder / 'frozen-cache'}",
        "lora.r=4",
        "lora.lora_dropout=0.1",
        "optim.lr=5e-3",
        "loop.micro_batch_size=2",
        "loop.gradient_accumulation_steps=2",
        "loop.epochs=50",
        "loop.samples=1",
        f"output={output}",
        *more,
    ]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def losses(output: Path) -> dict[int, float]:
    """Step -> loss; each step stands in the file once."""
    lines = [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)
    return found


@dataclass(frozen=True)
class Fault:
    """A signal that a rank gets as it fetches the data of a step, or a moment later."""

    rank: int
    step: int
    signum: int
    delay_s: float = 0.0

    def inject(self) -> None:
        """The real loader, and the signal once it is at the step."""
        fetch, fault = Loader.next_step, self

        def next_step(loader: Loader) -> list[MicroBatch]:
            if loader.position == fault.step:
                hit = functools.partial(os.kill, os.getpid(), fault.signum)
                threading.Timer(fault.delay_s, hit).start() if fault.delay_s else hit()
            return fetch(loader)

        Loader.next_step = next_step  # type: ignore[method-assign]


@dataclass(frozen=True)
class Shortage:
    """No memory for a micro-batch of more than ``tokens`` tokens on a rank."""

    rank: int
    tokens: int

    def inject(self) -> None:
        short_memory.limit(pytest.MonkeyPatch(), "backward", self.tokens, layer=1)


def rank_main(
    argv: list[str],
    rank: int,
    world_size: int,
    port: int,
    fault: Fault | Shortage | None,
    stderr: Path | None,
) -> None:
    if stderr is not None:
        os.dup2(os.open(stderr / f"stderr{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    become_rank(rank, world_size, port)
    if fault is not None and fault.rank == rank:
        fault.inject()
    sys.exit(main(argv))


@contextmanager
def two_ranks() -> Iterator[Callable[..., list[BaseProcess]]]:
    """``start_ranks``, none of which outlives the block."""
    started: list[BaseProcess] = []

    def start(*args: Any, **settings: Any) -> list[BaseProcess]:
        ranks = start_ranks(*args, **settings)
        started.extend(ranks)
        return ranks

    try:
        yield start
    finally:
        for process in started:
            process.kill()


def start_ranks(
    argv: list[str],
    fault: Fault | Shortage | None = None,
    stderr: Path | None = None,
    world_size: int = 2,
) -> list[BaseProcess]:
    """Ranks as a launcher starts them, forked from a process that has imported everything.

    ``stderr``: the folder for what they say there, in ``stderr0``, ``stderr1`` ...
    """
    port = free_port()
    return [
        processes.start(rank_main, argv, rank, world_size, port, fault, stderr)
        for rank in range(world_size)
    ]


def exit_codes(ranks: list[BaseProcess]) -> list[int | None]:
    for rank in ranks:
        rank.join(WAIT_S)
    return [rank.exitcode for rank in ranks]
