"""``fttrain train`` on a tiny model, and two ranks of it that can be hit by a signal."""

import functools
import multiprocessing
import os
import sys
import threading
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from fttrain.cli import main
from fttrain.data.batch import MicroBatch
from fttrain.data.loader import Loader
from fttrain.launch import free_port
from fttrain.track import read_metrics

WAIT_S = 300


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


def rank_main(argv: list[str], rank: int, port: int, fault: Fault | None) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    if fault is not None and fault.rank == rank:
        inject(fault)
    sys.exit(main(argv))


def inject(fault: Fault) -> None:
    """The real loader, and the signal once it is at the step."""
    fetch = Loader.next_step

    def next_step(loader: Loader) -> list[MicroBatch]:
        if loader.position == fault.step:
            signal_self = functools.partial(os.kill, os.getpid(), fault.signum)
            threading.Timer(fault.delay_s, signal_self).start() if fault.delay_s else signal_self()
        return fetch(loader)

    Loader.next_step = next_step  # type: ignore[method-assign]


def start_ranks(argv: list[str], fault: Fault | None = None) -> list[BaseProcess]:
    """Two ranks as a launcher starts them, forked from a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fttrain.train", "fttrain.cli.train"])
    port = free_port()
    processes: list[BaseProcess] = []
    for rank in range(2):
        processes.append(context.Process(target=rank_main, args=(argv, rank, port, fault)))
        processes[-1].start()
    return processes


def exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(WAIT_S)
    return [process.exitcode for process in processes]
