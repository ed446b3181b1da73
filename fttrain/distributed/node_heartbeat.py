"""The heartbeat of nodes: a node that is gone ends the others, and nodes report work done alone.

The first rank of a node speaks for it, over a connection of its own to the store of the rendezvous.
A rank that dies breaks its connections, and the others' collectives end with an error. A node that
loses its power or its network breaks no connection: the others would wait for half an hour. So each
node writes a number to the store, another one every few seconds. A node whose number stays the same
for too long is gone; so is the node with the store, once the store no longer answers.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as torch_dist

from fttrain.distributed.peer_watchdog import DIED_EXIT_CODE
from fttrain.distributed.rendezvous import launcher_store
from fttrain.util.errors import UserError

BEAT_S = 5.0
SILENCE_S = 60.0  # TCP repairs shorter interruptions of a link

_DONE, _PROBLEM = "d", "p"  # first letter of a report about work; the problem follows
_FINISHED = "finished"  # in place of the number


class NodeHeartbeat:
    """The heartbeat of this node, and its watch over the others; on the node's first rank alone."""

    def __init__(
        self,
        store: Any,
        node: int,
        names: Sequence[str],
        abort: Callable[[UserError], None],
    ) -> None:
        """``node``: the number of this node; ``names``: host names of all nodes, by number;
        ``abort`` ends this rank's process with an error: no exception can reach it in a collective.
        """
        self.names = names
        self._store, self._node, self._abort = store, node, abort
        self._others = [number for number in range(len(names)) if number != node]
        self._work_ids = itertools.count()
        self._beat_at_s = dict.fromkeys(self._others, time.monotonic())
        self._finished: set[int] = set()
        self._closed = threading.Event()
        # Two threads: the one that waits for an answer of the store cannot watch the time.
        for loop in (self._beat, self._watch):
            threading.Thread(target=loop, name="watch nodes", daemon=True).start()

    def report_work(self, work_id: int, problem: str) -> None:
        """Report that this node has done the work ``work_id``, or has a ``problem`` with it."""
        self._store.set(_work_key(work_id, self._node), _PROBLEM + problem if problem else _DONE)

    def next_work_id(self) -> int:
        """The number of the next work that every node does, the same on each."""
        return next(self._work_ids)

    def poll_work(self, work_id: int) -> tuple[str, list[str]]:
        """The problem that another node has with the work ``work_id`` ("" for none), and the names
        of the nodes that have not done it yet. Returns at once.
        """
        missing = []
        for number in self._others:
            key = _work_key(work_id, number)
            if not self._store.check([key]):
                missing.append(self.name(number))
                continue
            report = self._store.get(key).decode()
            if report[:1] == _PROBLEM:
                return f"{self.name(number)}: {report[1:]}", []
        return "", missing

    def name(self, number: int) -> str:
        """A node as messages call it."""
        return f"machine {number} ({self.names[number]})"

    def close(self) -> None:
        """Stop the heartbeat: this node's ranks are done, and its silence is no failure."""
        self._closed.set()
        with contextlib.suppress(RuntimeError):  # the store may have gone first
            self._store.set(_beat_key(self._node), _FINISHED)

    def _beat(self) -> None:
        """Write this node's number and read the others', in a thread. It ends where the store is
        gone; every other node then counts as silent.
        """
        beats: dict[int, bytes] = {}
        with contextlib.suppress(RuntimeError):
            for beat in itertools.count():
                self._store.set(_beat_key(self._node), str(beat))
                for number in self._others:
                    key = _beat_key(number)
                    last = self._store.get(key) if self._store.check([key]) else b""
                    if last == _FINISHED.encode():
                        self._finished.add(number)
                    elif last != beats.get(number):
                        beats[number], self._beat_at_s[number] = last, time.monotonic()
                if self._closed.wait(BEAT_S):
                    return

    def _watch(self) -> None:
        """End this rank once a node was silent for too long, in another thread."""
        while not self._closed.wait(min(1.0, BEAT_S)):
            now = time.monotonic()
            silent = [
                self.name(number)
                for number in self._others
                if number not in self._finished and now - self._beat_at_s[number] > SILENCE_S
            ]
            if silent:
                have = "has" if len(silent) == 1 else "have"
                not_heard = f"{have} not been heard of for {SILENCE_S:.0f} s"
                self._abort(lost(f"{' and '.join(silent)} {not_heard}"))
                return


def start_heartbeat(
    session: str, node: int, names: Sequence[str], abort: Callable[[UserError], None]
) -> NodeHeartbeat:
    """The heartbeat of this node, started. ``session``: name of this process group, for a store may
    outlive several; the others: as ``NodeHeartbeat`` takes them.
    """
    stores: Any = torch_dist
    store = stores.PrefixStore(f"heartbeat/{session}", launcher_store())
    return NodeHeartbeat(store, node, names, abort)


def lost(what: str) -> UserError:
    """The error of a run whose nodes have lost each other, as ``what`` says."""
    return UserError(
        f"{what}, so this machine stops too; checkpoints are whole, and the same command goes on "
        "from the newest once all machines are there again",
        DIED_EXIT_CODE,
    )


def lost_connection(error: BaseException) -> UserError | None:
    """The error for the user where ``error`` is one of a transport; None where it is not."""
    text = " ".join(str(error).split())
    transport = isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in text
    )
    if not transport:
        return None
    _, _, message = text.rpartition("] ") if text.startswith("[") else ("", "", text)
    return lost(f"the connection to another rank broke ({message[:200]})")


def _work_key(work_id: int, node: int) -> str:
    return f"work/{work_id}/{node}"


def _beat_key(node: int) -> str:
    return f"beat/{node}"
