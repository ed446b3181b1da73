"""Runs a function on several ranks over gloo on the CPU.

``results = run_ranks(function, 2, *args)`` starts two processes, joins them into one process group
and returns what ``function(*args)`` returned on each rank. ``function`` must be importable: a plain
function of a module.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import processes

from fttrain.launcher.launch import die_with_parent, free_port


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    process_group: bool = True,
) -> list[Any]:
    """``function(*args)`` on ``world_size`` ranks; their results in rank order.

    ``process_group=False`` leaves ``init_process_group`` to the function: RANK, LOCAL_RANK,
    WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set in any case. One thread a
    rank. Raises RuntimeError with the traceback of the first rank that fails, TimeoutError after
    ``timeout_s`` seconds; no rank is left behind either way.
    """
    # Plain bytes: a tensor must not travel as shared memory that dies with a rank.
    work = pickle.dumps((function, args))
    port = free_port()
    ranks, connections = [], []
    try:
        for rank in range(world_size):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            ranks.append(
                processes.start(_rank_main, work, sender, rank, world_size, port, process_group)
            )
            sender.close()
            connections.append(receiver)
        results = _collect(connections, time.monotonic() + timeout_s)
        for process in ranks:
            process.join(timeout=10)
        return results
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()


def become_rank(rank: int, world_size: int, port: int, here: int | None = None) -> None:
    """Set what a launcher sets in a rank's environment; ``here``: ranks on a machine, all by
    default.
    """
    here = here or world_size
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank % here),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(here),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )


def _collect(connections: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        pending = [c for rank, c in enumerate(connections) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(connections)) if rank not in results]
            raise TimeoutError(f"ranks {missing} did not finish in time")
        for connection in ready:
            rank = connections.index(connection)  # type: ignore[arg-type]
            try:
                good, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word (killed?)") from None
            if not good:
                raise RuntimeError(f"rank {rank} of {len(connections)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _rank_main(
    work: bytes,
    sender: Connection,
    rank: int,
    world_size: int,
    port: int,
    process_group: bool,
) -> None:
    die_with_parent(os.getppid())
    become_rank(rank, world_size, port)
    try:
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        if process_group:
            torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
        function, args = pickle.loads(work)
        answer = pickle.dumps((True, function(*args)))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # nobody hangs up while another rank still talks to it
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
