"""Processes with a time limit, so that a hanging check ends."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from fttrain.launcher.environment import rank_variables
from fttrain.launcher.launch import free_port

POLL_S = 0.05


@dataclass(frozen=True)
class Outcome:
    """The common result of some processes."""

    answer: str = ""  # output of the first process, where all succeeded
    problem: str = ""  # the error; "" where all succeeded


def run_module(
    module: str,
    arguments: Sequence[str],
    ranks: int,
    limit_s: float,
    variables: Mapping[str, str] | None = None,
) -> Outcome:
    """Run ``python -m module arguments`` as ``ranks`` ranks of this machine; none outlives the
    call. ``variables``: of the environment, besides those of a rank.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # accelerate's store is not at this port
        **(variables or {}),
    }
    port = free_port()
    command = [sys.executable, "-m", module, *arguments]
    with contextlib.ExitStack() as files:
        started = []
        for rank in range(ranks):
            errors = files.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                command,
                env={**environment, **rank_variables(rank, ranks, port)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=errors,
            )
            started.append(_Process(process, errors))
        try:
            return _wait(started, limit_s)
        finally:
            for each in started:
                each.process.kill()
                each.process.wait()


@dataclass(frozen=True)
class _Process:
    process: "subprocess.Popen[bytes]"
    errors: IO[bytes]

    def last_words(self) -> str:
        """The last line of its errors, or its exit code without one."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.returncode}"


def _wait(started: Sequence[_Process], limit_s: float) -> Outcome:
    """Wait until all have succeeded or one has failed: the others may wait for it forever."""
    deadline = time.monotonic() + limit_s
    while True:
        codes = [each.process.poll() for each in started]
        failed = next((each for each, code in zip(started, codes, strict=True) if code), None)
        if failed is not None:
            return Outcome(problem=failed.last_words())
        if None not in codes:
            output, _ = started[0].process.communicate()
            return Outcome(output.decode(errors="replace").strip())
        if time.monotonic() > deadline:
            return Outcome(problem=f"no answer within {limit_s:.0f} s: it hangs")
        time.sleep(POLL_S)
