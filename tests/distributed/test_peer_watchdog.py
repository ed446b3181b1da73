"""A rank that dies or fails ends the others, with its name; one that has left disturbs nobody."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as torch_dist
from ranks import become_rank

from fttrain import cli
from fttrain.distributed import peer_watchdog
from fttrain.distributed.collectives import all_gather
from fttrain.distributed.process_group import process_group
from fttrain.distributed.rank_group import RankGroup
from fttrain.launcher import launch
from fttrain.util.errors import UserError

WAIT_S = 60
FOREVER_S = 600  # no test waits so long
Work = Callable[[RankGroup, Path], None]


def rank_main(
    work: Work,
    rank: int,
    world_size: int,
    here: int | None,
    port: int,
    folder: Path,
    grace_s: float,
) -> None:
    """A rank with the real command line around ``work``; its stderr goes into a file. ``here``:
    ranks on a machine, None: all.
    """
    become_rank(rank, world_size, port, here)
    os.dup2(os.open(folder / f"stderr{rank}", os.O_CREAT | os.O_WRONLY), 2)
    peer_watchdog.POLL_S, peer_watchdog.GRACE_S, cli._LATER_S = 0.05, grace_s, 0.0

    def command(_arguments: list[str]) -> int:
        with process_group(torch.device("cpu")) as group:
            work(group, folder)
        return 0

    cli._dispatch = command
    sys.exit(cli.main([]))


Start = Callable[..., tuple[list[int | None], list[str]]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """Runs a function on ranks until all have ended: their exit codes and what they said."""
    started: list[BaseProcess] = []

    def run(
        work: Work, world_size: int = 2, grace_s: float = 0.3, here: int | None = None
    ) -> tuple[list[int | None], list[str]]:
        port = launch.free_port()
        for rank in range(world_size):
            started.append(
                processes.start(rank_main, work, rank, world_size, here, port, tmp_path, grace_s)
            )
        for process in started:
            process.join(WAIT_S)
        said = [(tmp_path / f"stderr{rank}").read_text() for rank in range(world_size)]
        return [process.exitcode for process in started], said

    yield run
    for process in started:
        process.kill()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def waiting_in(wait: Work, group: RankGroup, folder: Path, victim: int) -> None:
    """``victim`` dies, the others are waiting for it."""
    group.barrier()
    if group.rank == victim:
        time.sleep(0.3)
        (folder / "victim").write_text(str(os.getpid()))
        die()
    wait(group, folder)


def gather(group: RankGroup, _folder: Path) -> None:
    shard = torch.ones(1000)
    all_gather(shard.new_empty(1000 * group.world_size), shard).wait()


def reduce(group: RankGroup, _folder: Path) -> None:
    group.all_reduce_(torch.ones(1000))


def receive(group: RankGroup, _folder: Path) -> None:
    """Each from the next, which is alive but for the last."""
    torch_dist.recv(torch.empty(10), group.rank + 1)


def hang(_group: RankGroup, _folder: Path) -> None:
    """As a kernel of NCCL does: no error ever comes."""
    time.sleep(FOREVER_S)


def receive_from_one_that_hangs(group: RankGroup, folder: Path) -> None:
    if group.rank == 0:
        receive(group, folder)
    hang(group, folder)


@pytest.mark.parametrize(
    ("wait", "world_size", "victim", "grace_s"),
    [
        (gather, 2, 0, FOREVER_S),  # FOREVER_S: by the error of the transport, not by the thread
        (gather, 3, 2, FOREVER_S),
        (reduce, 2, 1, FOREVER_S),
        (reduce, 3, 0, FOREVER_S),
        (receive, 3, 2, FOREVER_S),
        (receive_from_one_that_hangs, 3, 2, 0.3),
        (hang, 2, 0, 0.3),
        (hang, 3, 1, 0.3),
    ],
)
def test_a_death_ends_the_others_with_its_name(
    wait: Work, world_size: int, victim: int, grace_s: float, run: Start, tmp_path: Path
) -> None:
    work = functools.partial(waiting_in, wait, victim=victim)
    codes, said = run(work, world_size, grace_s)
    pid = (tmp_path / "victim").read_text()
    for rank in range(world_size):
        if rank == victim:
            assert (codes[rank], said[rank]) == (-signal.SIGKILL, "")
            continue
        assert codes[rank] == peer_watchdog.DIED_EXIT_CODE
        where = f"rank {rank}: " if rank else ""
        line = f"fttrain: error: {where}rank {victim} (pid {pid}) died"
        assert [text[: len(line)] for text in errors(said[rank])] == [line]
        assert "Traceback" not in said[rank]


def test_a_death_on_another_machine_is_told_as_a_lost_connection(run: Start) -> None:
    """By the one beside it with its name; each machine has one who speaks."""
    codes, said = run(functools.partial(waiting_in, reduce, victim=3), 4, FOREVER_S, here=2)
    assert codes == [peer_watchdog.DIED_EXIT_CODE] * 3 + [-signal.SIGKILL]
    assert "rank 3 (pid " in said[2]
    for rank in (0, 1):
        assert "the connection to another rank broke (" in said[rank]
    assert "Traceback" not in "".join(said)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("fttrain: error:")]


def die_before_a_child(group: RankGroup, _folder: Path) -> None:
    """The child keeps the connections open: no error comes."""
    if group.rank == 1:
        if os.fork() == 0:
            time.sleep(10)
            os._exit(0)
        die()
    group.barrier()


def test_a_child_does_not_hide_the_death_of_its_parent(run: Start) -> None:
    codes, said = run(die_before_a_child)
    assert codes == [peer_watchdog.DIED_EXIT_CODE, -signal.SIGKILL]
    assert "rank 1 (pid" in said[0]


def save_while_one_dies(group: RankGroup, folder: Path) -> None:
    if group.rank == 1:
        die()
    with peer_watchdog.uninterruptible:
        time.sleep(1)
        (folder / "saved").write_text("whole")
    time.sleep(FOREVER_S)


def test_a_save_is_not_cut_short(run: Start, tmp_path: Path) -> None:
    codes, _ = run(save_while_one_dies, grace_s=0.1)
    assert codes == [peer_watchdog.DIED_EXIT_CODE, -signal.SIGKILL]
    assert (tmp_path / "saved").read_text() == "whole"


def leave_early(group: RankGroup, folder: Path) -> None:
    """Rank 1 is gone, process and all, while rank 0 still works."""
    other = int(group.gather([float(os.getpid())])[1][0])
    if group.rank == 1:
        return
    while state(other) not in ("", "Z"):
        time.sleep(0.02)
    time.sleep(1)
    (folder / "report").write_text("done")


def state(pid: int) -> str:
    """Of a process, as ps shows it: R, S, T (stopped), Z (zombie) ...; "" for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_rank_that_leaves_early_disturbs_nobody(run: Start, tmp_path: Path) -> None:
    assert run(leave_early, grace_s=0.1) == ([0, 0], ["", ""])
    assert (tmp_path / "report").read_text() == "done"


def stand_still(group: RankGroup, _folder: Path) -> None:
    """Rank 1 is stopped, and goes on when rank 0 says so."""
    other = int(group.gather([float(os.getpid())])[1][0])
    if group.rank == 1:
        os.kill(other, signal.SIGSTOP)
    else:
        while state(other) != "T":
            time.sleep(0.02)
        time.sleep(1)
        os.kill(other, signal.SIGCONT)
    group.barrier()


def test_a_stopped_rank_is_waited_for(run: Start) -> None:
    assert run(stand_still, grace_s=0.1) == ([0, 0], ["", ""])


def fail(wait: Work, group: RankGroup, folder: Path, error: Exception) -> None:
    if group.rank == 1:
        raise error
    wait(group, folder)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("the disk is full", 7), 7, "the disk is full"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
        (RuntimeError("CUDA out of memory"), 1, "RuntimeError: CUDA out of memory"),
    ],
    ids=["user", "bug", "runtime"],
)
@pytest.mark.parametrize(("wait", "grace_s"), [(reduce, FOREVER_S), (hang, 0.3)])
def test_an_error_of_one_rank_is_the_error_of_all(
    error: Exception, code: int, message: str, wait: Work, grace_s: float, run: Start
) -> None:
    codes, said = run(functools.partial(fail, wait, error=error), 3, grace_s)
    assert codes == [code] * 3
    assert errors(said[0]) == [f"fttrain: error: rank 1: {message}"]
    assert errors(said[2]) == [f"fttrain: error: rank 2: rank 1: {message}"]
    assert message in said[1]


def test_a_long_message_is_cut() -> None:
    lock = peer_watchdog.LivenessLock()
    _, pid, descriptor = lock.address.rsplit(" ", 2)
    peer = peer_watchdog.Peer(1, pid, descriptor)
    assert peer.failure() is None
    lock.mark_failed(256, "ä" * 5000)
    failure = peer.failure()
    assert failure is not None
    assert (failure.exit_code, str(failure)) == (1, f"rank 1: {'ä' * 1000}")
    lock.mark_finished()
    assert peer.failure() is None
