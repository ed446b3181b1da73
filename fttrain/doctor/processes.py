"""Processes with a time limit: what hangs there hangs no one here."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from fttrain.launch import PARENT_PID, free_port


@dataclass(frozen=True)
class Outcome:
    """How some processes ended, together."""

    answer: str = ""  # what the first one wrote, where all ended well
    problem: str = ""  # what went wrong; "" where nothing did
    hung: bool = False  # they did not end in time


def run_module(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    limit_s: float,
    variables: Mapping[str, str] | None = None,
) -> Outcome:
    """``python -m module arguments`` as so many ranks of this machine, none of which outlives the
    call. ``variables``: beside those of a rank.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # accelerate's store is not at this port
        PARENT_PID: str(os.getpid()),
        **(variables or {}),
    }
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile() as errors:
        processes = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=errors,
            )
            for rank in range(ranks)
        ]
        try:
            return _wait(processes, limit_s) or Outcome(problem=_last_line(errors, processes))
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _wait(processes: Sequence["subprocess.Popen[bytes]"], limit_s: float) -> Outcome | None:
    """None: some failed."""
    deadline = time.monotonic() + limit_s
    try:
        written, _ = processes[0].communicate(timeout=limit_s)
        for process in processes[1:]:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        if any(process.poll() not in (None, 0) for process in processes):
            return None  # the others wait for one that failed
        return Outcome(problem=f"no answer within {limit_s:.0f} s: it hangs", hung=True)
    if any(process.returncode for process in processes):
        return None
    return Outcome(written.decode(errors="replace").strip())


def _last_line(errors: IO[bytes], processes: Sequence["subprocess.Popen[bytes]"]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    codes = [process.poll() for process in processes]
    return lines[-1] if lines else f"exit codes {codes}"
