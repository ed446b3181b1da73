"""The launcher: it starts the ranks of a run on this machine, and none of them outlives it.

``accelerate launch --config_file launch/NAME.yaml -m fttrain train ...`` and ``fttrain train
launch=NAME ...`` read the same file and start the same ranks. The second needs nothing around it:
this module is its launcher. Each rank is ``python -m fttrain train ...`` in a session of its own,
so that Ctrl-C in a terminal reaches the launcher alone, which passes it on once. The ranks get the
time that they need to save.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fttrain.launcher.accelerate_yaml import integer, read_files
from fttrain.launcher.environment import PARENT_PID, rank_variables
from fttrain.util.errors import UserError

GRACE_S = 30.0  # after a rank died: from SIGTERM to SIGKILL for the others
REPEAT_S = 5.0  # signals within this time after the first count as the same request
POLL_S = 0.05
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class LaunchConfig:
    """The launch file and the number of ranks."""

    name: str = "none"  # for the log
    # accelerate config file: a name in launch/ or an absolute path; null: this process is the run
    file: str | None = None
    processes: int | None = None  # ranks; null: num_processes of the file, or 1

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise UserError(f"launch.processes={self.processes}: a whole number of 1 or more")


def is_owned() -> bool:
    """Whether this process is to end with its parent: a rank with its launcher, a trial with its
    sweep.
    """
    return is_rank() or PARENT_PID in os.environ


def is_rank() -> bool:
    """Whether a launcher (this one, accelerate, torchrun) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun (or accelerate over it) has restarted this rank after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def wanted(config: LaunchConfig) -> bool:
    """Whether ranks are to be started by ``start``: the settings ask for them, and this process is
    not one itself.
    """
    return not is_rank() and (config.file is not None or (config.processes or 1) > 1)


def require_ranks(config: LaunchConfig) -> None:
    """Raise UserError where the settings ask for ranks that nobody has started, as in a script that
    calls the Python functions itself.
    """
    if wanted(config):
        raise UserError(
            f"launch={config.name}: this process is one rank and starts no others; leave launch= "
            "out, or start the script with torchrun or accelerate launch"
        )


def ranks_wanted(config: LaunchConfig) -> int | None:
    """The number of ranks on this machine, as a launcher has started or would start them; None
    where neither launcher nor settings state one.

    Raises UserError when the launch file cannot be used.
    """
    if is_rank():
        return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return config.processes or integer(read_files(config.file)[0], "num_processes", 0) or None


def start(config: LaunchConfig, argv: list[str]) -> int:
    """Run ``python -m fttrain argv`` on every rank, and return the exit code of the run.

    That is 0, the code of the first rank that failed, or 128 + the signal that stopped the run.
    Raises UserError when the launch file cannot be used.
    """
    return supervise(commands(config, argv))


def commands(config: LaunchConfig, argv: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The command and the environment of each rank, in rank order."""
    settings, variables = read_files(config.file)
    processes = config.processes or integer(settings, "num_processes", 1)
    port = free_port(integer(settings, "main_process_port", 0))
    environment = {**variables, **os.environ}  # the user's variables win over the file's
    if settings.get("gpu_ids", "all") not in ("all", None):
        environment.setdefault("CUDA_VISIBLE_DEVICES", str(settings["gpu_ids"]))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    command = [sys.executable, "-m", "fttrain", *argv]
    return [
        (command, environment | rank_variables(rank, processes, port)) for rank in range(processes)
    ]


def supervise(commands: list[tuple[list[str], dict[str, str]]], grace_s: float = GRACE_S) -> int:
    """Start one rank per (command, environment), wait for all of them, and return the exit code of
    the run. ``grace_s``: as ``GRACE_S``.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    stops = Stops(lambda signum: _send(ranks, signum))
    with handlers(stops.receive):
        try:
            for command, environment in commands:
                ranks.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
                    )
                )
                if stops.signum is not None:
                    # the signal came while ranks were being started
                    _send([ranks[-1]], stops.signum)
            failed = _wait(ranks, stops, grace_s)
        finally:
            _send(ranks, signal.SIGKILL)
            for rank in ranks:
                rank.wait()
    if failed is not None:
        return _exit_code(failed, ranks[failed].returncode)
    if stops.signum is not None and any(rank.returncode for rank in ranks):
        return 128 + stops.signum
    return 0


class Stops:
    """The user's requests to stop: the first signal is passed on, a later one repeats it, the third
    kills.
    """

    def __init__(self, send: Callable[[int], None]) -> None:
        """``send``: passes a signal on to the ranks."""
        self.signum: int | None = None  # the first that was passed on
        self.killed = False  # whether a third signal came
        self._pass_on = send
        self._times = 0
        self._last_s = 0.0

    def receive(self, signum: int, _frame: FrameType | None) -> None:
        """Take a signal, as its handler."""
        now = time.monotonic()
        if self._times and now - self._last_s < REPEAT_S:
            return
        self._times, self._last_s = self._times + 1, now
        if self._times == 1:
            # A closed terminal (SIGHUP) is a request to save and stop like any other.
            self.signum = signal.SIGTERM if signum == signal.SIGHUP else signum
        self.killed = self._times >= 3
        self._pass_on(signal.SIGKILL if self.killed else self.signum or signum)


@contextmanager
def handlers(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle the signals that mean stop with ``handler``, for the length of the block. Only the
    main thread may enter it.
    """
    previous = {signum: signal.signal(signum, handler) for signum in _STOPS}
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)


def _wait(ranks: list[subprocess.Popen[bytes]], stops: Stops, grace_s: float) -> int | None:
    """Wait for all ranks, and return the number of the first that failed. Once one fails the others
    are asked to stop, then killed.
    """
    failed: int | None = None
    deadline = float("inf")
    while any(rank.poll() is None for rank in ranks):
        if failed is None:
            failed = _first_failure(ranks, stops)
            if failed is not None:
                _send(ranks, signal.SIGTERM)
                deadline = time.monotonic() + grace_s
        elif time.monotonic() > deadline:
            _send(ranks, signal.SIGKILL)
        time.sleep(POLL_S)
    return _first_failure(ranks, stops) if failed is None else failed


def _first_failure(ranks: list[subprocess.Popen[bytes]], stops: Stops) -> int | None:
    """The number of the rank that failed first; None where none has."""
    expected: set[int | None] = {None, 0}  # None: still running
    if stops.signum is not None:
        expected |= {128 + stops.signum, -stops.signum}
    if stops.killed:
        expected.add(-signal.SIGKILL)
    failed = [index for index, rank in enumerate(ranks) if rank.poll() not in expected]
    # Among several that ended since the last poll, a rank that was killed is why the others ended.
    return min(failed, key=lambda index: (ranks[index].returncode >= 0, index), default=None)


def _send(ranks: list[subprocess.Popen[bytes]], signum: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signum)


def _exit_code(rank: int, returncode: int) -> int:
    """The exit code of a run whose rank ended like this, after a line for the user if it was
    killed.
    """
    if returncode >= 0:
        return returncode
    print(f"fttrain: error: rank {rank} was {killed_by(-returncode)}", file=sys.stderr)
    return 128 - returncode


def killed_by(signum: int) -> str:
    """A sentence part that names the signal that ended a process."""
    hint = " (out of host memory? `dmesg` tells)" if signum == signal.SIGKILL else ""
    return f"killed by {signal.Signals(signum).name}{hint}"


def free_port(preferred: int = 0) -> int:
    """The TCP port ``preferred`` if it is free here, otherwise (and for 0) any free one."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError("no free TCP port on 127.0.0.1")


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to SIGKILL this process when its parent dies; without effect outside Linux.

    ``parent``: the pid of the launcher, if it is known; a launcher that is already gone ends this
    process at once.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or int(os.environ.get(PARENT_PID, 0)) or os.getppid()
    pr_set_pdeathsig = 1  # from <linux/prctl.h>
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(pr_set_pdeathsig, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the request: no signal will come
        os.kill(os.getpid(), signal.SIGKILL)
