"""What a rank of ``fit70b.py`` does: set itself up within its part of a card, train, report."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import common

from fttrain.util.errors import UserError

REFUSED, OUT_OF_MEMORY = 8, 9  # exit codes of all ranks, whichever of them it was
CONTEXT_GIB = 0.6  # CUDA's context and NCCL's buffers, outside torch's allocator

Kinds = type[Exception] | tuple[type[Exception], ...]
Figures = dict[str, Any]


def run_rank(job_file: str) -> None:
    """The steps of a job on this rank."""
    memory = common.HostMemory()
    job = common.read_job(job_file)
    end_by(job["ends_s"])
    from harness.multiprocessors import limited

    from fttrain.distributed.process_group import process_group

    device = _device(job)
    try:
        with (
            process_group(device, job["backend"]) as group,
            limited(job["limits"]["multiprocessors"], device),
        ):
            figures = run_steps(job, group, memory, partial(common.note, job_file))
            group.barrier()  # nobody hangs up while another rank still talks
            common.report(job_file, figures)
    except UserError as error:
        _give_up(job_file, error)


def end_by(ends_s: float) -> None:
    """This process ends then, as ``time.time`` has it, wherever it is: in a collective, in the
    driver. That is the signal's default action.
    """
    signal.alarm(max(1, math.ceil(ends_s - time.time())))


def run_steps(
    job: dict[str, Any],
    group: Any,
    memory: common.HostMemory,
    note: Callable[[Figures], None] = lambda figures: None,
) -> Figures:
    """Build, train; the figures of this rank. ``note``: takes them after each step."""
    import torch
    from harness.driver_memory import DriverMemory
    from harness.fit_steps import build, train
    from harness.link import paced

    from fttrain.strategy.protocol import OutOfMemory

    def say(text: str) -> None:
        if group.is_main:
            common.say(job["started_s"], f"  {text}")

    started = time.perf_counter()
    on_cuda = group.device.type == "cuda"
    properties = torch.cuda.get_device_properties(group.device) if on_cuda else None
    with (
        DriverMemory(str(properties.uuid)) if properties else nullcontext() as driver,
        paced(job["limits"]["link"]) as ways,
        answer((OutOfMemory, torch.OutOfMemoryError), OUT_OF_MEMORY),
    ):
        with answer(UserError, REFUSED):
            trained = build(job, group, say)
        loading_s = time.perf_counter() - started

        def figures(steps: list[Figures]) -> Figures:
            return {
                "loading_s": loading_s,
                "steps": steps,
                "device_name": properties.name if properties else "CPU",
                "shared_device": on_cuda and torch.cuda.device_count() < job["ranks"],
                "peak_host_bytes": memory.peak_bytes(),
                "shared_host_bytes": memory.shared_bytes(),
                "carried_bytes": {name: way.carried_bytes for name, way in ways.items()},
                "reserved_bytes": torch.cuda.max_memory_reserved(group.device) if on_cuda else None,
                "nvml_bytes": driver.own_bytes if driver else None,
                "nvml_card_bytes": driver.card_bytes if driver else None,
            }

        steps = train(job, group, trained, say, lambda steps: note(figures(steps)))
        return figures(steps)  # while ``trained`` still maps what ranks share


@contextmanager
def answer(kinds: Kinds, exit_code: int) -> Iterator[None]:
    """What a machine is too small for is an answer, told to all ranks by its exit code."""
    from fttrain.memory.device import is_out_of_memory

    try:
        yield
    except kinds as error:
        # Memory that runs out while a strategy is built comes as a line that explains it.
        short = error.__cause__ is not None and is_out_of_memory(error.__cause__)
        code = OUT_OF_MEMORY if short else exit_code
        raise UserError(str(error).splitlines()[0], code) from error


def _give_up(job_file: str, error: UserError) -> NoReturn:
    """Leave the reason where ``reason`` finds it. Nothing here waits for the other ranks."""
    rank = int(os.environ["RANK"])
    print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
    Path(job_file).with_suffix(f".rank{rank}.reason").write_text(str(error))
    os._exit(error.exit_code)


def reason(folder: Path) -> str:
    """Why the ranks of the job in ``folder`` gave up, where one of them said so."""
    said = [file.read_text() for file in sorted(folder.glob("*.reason"))]
    return said[0] if said else ""


def _device(job: dict[str, Any]) -> Any:
    """This rank's; on CUDA torch's allocator is capped, and two ranks may share one card."""
    import torch

    if job["device"] == "cpu":
        return torch.device("cpu")
    rank, cards = int(os.environ["RANK"]), torch.cuda.device_count()
    device = torch.device("cuda", rank % cards)
    torch.cuda.set_device(device)
    total = torch.cuda.mem_get_info(device)[1]
    fraction = (job["cap_gib"] - CONTEXT_GIB) * 2**30 / total
    torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0), device)
    if cards < job["ranks"]:
        # NCCL refuses two ranks of one host on one GPU: say that they are on two, with nothing
        # between them but sockets, whatever network the machine has.
        apart = {"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        os.environ |= apart
    return device
