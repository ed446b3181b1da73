"""What machines tell each other beside the collectives of their ranks: that they are still there,
and how work went that each of them does alone.

The first rank of a machine speaks for it, over a connection of its own to the store where the ranks
met. A rank that dies breaks its connections, and the others' collectives end with an error. A
machine that loses its power or its network breaks nothing: they would wait for half an hour. So
each machine writes a number there, another one every few seconds; one whose number stays the same
for too long is gone, and so is the one with the store, for whoever no longer gets an answer.
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
SILENCE_S = 60.0  # a link that is out for less goes unnoticed, as TCP sends again

_DONE, _PROBLEM = "d", "p"  # first letter of what a machine says of its work; the problem follows
_LEFT = "left"


class NodeHeartbeat:
    """This machine's view of the others; made by its first rank alone."""

    def __init__(
        self,
        store: Any,
        own: int,
        names: Sequence[str],
        end: Callable[[UserError], None],
    ) -> None:
        """``own``: the number of this machine; ``names``: of all, by number. ``end`` ends this rank
        with an error where no exception can reach it.
        """
        self.names = names
        self._store, self._own, self._end = store, own, end
        self._others = [number for number in range(len(names)) if number != own]
        self._works = itertools.count()
        self._heard_s = dict.fromkeys(self._others, time.monotonic())
        self._left: set[int] = set()
        self._over = threading.Event()
        # Two: one that waits for an answer that never comes cannot tell the time.
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name="watch machines", daemon=True).start()

    def say(self, work: int, problem: str) -> None:
        """This machine has done ``work``, or has a ``problem`` with it."""
        self._store.set(_key(work, self._own), _PROBLEM + problem if problem else _DONE)

    def next_work(self) -> int:
        """A number for what every machine does next."""
        return next(self._works)

    def heard(self, work: int) -> tuple[str, list[str]]:
        """The problem that another machine has with ``work``, and who has not done it yet."""
        missing = []
        for number in self._others:
            key = _key(work, number)
            if not self._store.check([key]):
                missing.append(self.name(number))
                continue
            said = self._store.get(key).decode()
            if said[:1] == _PROBLEM:
                return f"{self.name(number)}: {said[1:]}", []
        return "", missing

    def name(self, number: int) -> str:
        return f"machine {number} ({self.names[number]})"

    def close(self) -> None:
        """This machine's ranks are done."""
        self._over.set()
        with contextlib.suppress(RuntimeError):  # the store may have gone first
            self._store.set(_beat_key(self._own), _LEFT)

    def _beat(self) -> None:
        """A thread. Where the store is gone, nobody is heard of any more."""
        seen: dict[int, bytes] = {}
        with contextlib.suppress(RuntimeError):
            for beat in itertools.count():
                self._store.set(_beat_key(self._own), str(beat))
                for number in self._others:
                    key = _beat_key(number)
                    said = self._store.get(key) if self._store.check([key]) else b""
                    if said == _LEFT.encode():
                        self._left.add(number)
                    elif said != seen.get(number):
                        seen[number], self._heard_s[number] = said, time.monotonic()
                if self._over.wait(BEAT_S):
                    return

    def _watch(self) -> None:
        """Another thread."""
        while not self._over.wait(min(1.0, BEAT_S)):
            now = time.monotonic()
            silent = [
                self.name(number)
                for number in self._others
                if number not in self._left and now - self._heard_s[number] > SILENCE_S
            ]
            if silent:
                have = "has" if len(silent) == 1 else "have"
                not_heard = f"{have} not been heard of for {SILENCE_S:.0f} s"
                self._end(lost(f"{' and '.join(silent)} {not_heard}"))
                return


def start_heartbeat(
    session: str, own: int, names: Sequence[str], end: Callable[[UserError], None]
) -> NodeHeartbeat:
    """``session``: names this meeting of the ranks; a store may outlive several."""
    stores: Any = torch_dist
    return NodeHeartbeat(stores.PrefixStore(f"board/{session}", launcher_store()), own, names, end)


def lost(what: str) -> UserError:
    """The end of a run whose machines have lost each other."""
    return UserError(
        f"{what}, so this machine stops too; checkpoints are whole, and the same command goes on "
        "from the newest once all machines are there again",
        DIED_EXIT_CODE,
    )


def lost_connection(error: BaseException) -> UserError | None:
    """What ``error`` says where it is that of a transport."""
    text = " ".join(str(error).split())
    transport = isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in text
    )
    if not transport:
        return None
    _, _, said = text.rpartition("] ") if text.startswith("[") else ("", "", text)
    return lost(f"the connection to another rank broke ({said[:200]})")


def _key(work: int, machine: int) -> str:
    return f"work/{work}/{machine}"


def _beat_key(machine: int) -> str:
    return f"beat/{machine}"
