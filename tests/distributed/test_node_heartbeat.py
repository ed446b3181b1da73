"""What machines tell each other through a real store: that one is gone, and how work went that each
does alone.
"""

import os
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from ranks import become_rank, run_ranks

from fttrain.distributed import node_heartbeat
from fttrain.distributed.node_heartbeat import NodeHeartbeat, lost_connection
from fttrain.distributed.peer_watchdog import DIED_EXIT_CODE
from fttrain.distributed.process_group import process_group
from fttrain.distributed.rank_group import RankGroup
from fttrain.util.errors import UserError

NAMES = ("anna", "bert", "carl")
WAIT_S = 30
Start = Callable[[int], tuple[NodeHeartbeat, "queue.Queue[UserError]"]]


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Any], Start]]:
    """The store's server, and what makes the board of a machine, with what it ends for."""
    monkeypatch.setattr(node_heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(node_heartbeat, "SILENCE_S", 1.0)
    stores: Any = torch_dist
    servers = [stores.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    port = servers[0].port
    made: list[NodeHeartbeat] = []

    def start(number: int) -> tuple[NodeHeartbeat, "queue.Queue[UserError]"]:
        ends: queue.Queue[UserError] = queue.Queue()
        client = stores.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        made.append(NodeHeartbeat(client, number, NAMES, ends.put))
        return made[-1], ends

    yield servers, start
    for board in made:
        board.close()


def test_machines_that_are_there_end_nobody(boards: tuple[list[Any], Start]) -> None:
    """Neither does one that has left, however long the others still work."""
    _, start = boards
    made = [start(number) for number in range(3)]
    time.sleep(2 * node_heartbeat.SILENCE_S)
    made[2][0].close()
    time.sleep(2 * node_heartbeat.SILENCE_S)
    assert all(ends.empty() for _, ends in made)


def test_a_machine_that_falls_silent_ends_the_others(boards: tuple[list[Any], Start]) -> None:
    _, start = boards
    made = [start(number) for number in range(3)]
    made[1][0]._closed.set()  # its power is gone: it says nothing any more, not even that it leaves
    for number in (0, 2):
        reason = made[number][1].get(timeout=WAIT_S)
        assert str(reason).startswith("machine 1 (bert) has not been heard of for 1 s, so this")
        assert reason.exit_code == DIED_EXIT_CODE
    assert made[1][1].empty()


def test_without_the_store_nobody_is_heard_of(boards: tuple[list[Any], Start]) -> None:
    servers, start = boards
    made = [start(number) for number in range(3)]
    time.sleep(node_heartbeat.SILENCE_S / 2)
    servers.clear()  # the machine that has it is gone
    said = str(made[1][1].get(timeout=WAIT_S))
    assert said.startswith("machine 0 (anna) and machine 2 (carl) have not been heard of")


def test_work_is_over_when_all_have_done_it_or_one_cannot(boards: tuple[list[Any], Start]) -> None:
    _, start = boards
    made = [start(number)[0] for number in range(3)]
    first, second = (
        [board.next_work_id() for board in made],
        [board.next_work_id() for board in made],
    )
    assert (first, second) == ([0] * 3, [1] * 3)
    for number in (0, 1):
        made[number].report_work(0, "")
    wait_until(lambda: made[0].poll_work(0) == ("", ["machine 2 (carl)"]))
    made[2].report_work(0, "")
    wait_until(lambda: [board.poll_work(0) for board in made] == [("", [])] * 3)
    made[2].report_work(1, "the disk is full")
    wait_until(lambda: made[0].poll_work(1) == ("machine 2 (carl): the disk is full", []))


def wait_until(true: Callable[[], bool]) -> None:
    """What one has said takes its time to the store."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def each_alone() -> dict[str, Any]:
    """Two machines of one rank; the second one takes longer, then fails."""
    rank = int(os.environ["RANK"])
    become_rank(rank, 2, int(os.environ["MASTER_PORT"]), here=1)
    found: dict[str, Any] = {"order": []}
    with process_group(torch.device("cpu")) as group:
        found["places"] = (
            group.intra_node.rank,
            group.intra_node.world_size,
            group.inter_node.rank,
        )
        with group.node_local_work("work"):
            time.sleep(1.5 * rank)
            done = time.monotonic()
        found["after_s"] = time.monotonic() - done
        found["message"] = refused(group, "the disk is full" if rank else "")
        group.barrier()
        found["own"] = group.intra_node.sum(rank + 1)
    return found


def refused(group: RankGroup, problem: str) -> str:
    with pytest.raises(UserError) as error:
        fail_in_work(group, problem)
    return str(error.value)


def fail_in_work(group: RankGroup, problem: str) -> None:
    with group.node_local_work("work"):
        if problem:
            raise UserError(problem)


def test_who_is_done_waits_for_the_other_machine() -> None:
    first, second = run_ranks(each_alone, 2, process_group=False)
    assert (first["places"], second["places"]) == ((0, 1, 0), (0, 1, 1))
    assert first["after_s"] > second["after_s"]
    assert first["message"] == f"machine 1 ({os.uname().nodename}): the disk is full"
    assert second["message"] == "the disk is full"
    assert (first["own"], second["own"]) == (1, 2)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[/x/gloo/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1"), "(Conn"),
        (torch_dist.DistNetworkError("the client socket has failed"), "(the client socket"),
        (RuntimeError("CUDA out of memory"), None),
        (ValueError("gloo"), None),
    ],
)
def test_errors_of_a_transport(error: Exception, said: str | None) -> None:
    meant = lost_connection(error)
    assert (meant is None) is (said is None)
    if meant is not None and said is not None:
        assert said in str(meant)
        assert meant.exit_code == DIED_EXIT_CODE
