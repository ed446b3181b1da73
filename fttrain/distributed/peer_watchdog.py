"""Ends this rank, with the reason, once another rank of its machine has died or failed.

A rank that dies leaves the others in a collective that never ends, or with an error of the
transport that names nobody. So each rank holds a lock on a small file in memory and writes there
how it leaves the process group; the others open that file. The kernel drops the lock however a
process ends: a lock that is gone over a file that says nothing is a rank that died. A stopped
process (SIGSTOP) keeps its lock and is not taken for dead.

An error that leaves the process group is explained by what the peers' files say
(``PeerWatchdog.failed``). A rank that stays in a collective cannot be reached by an exception, so a
thread ends its process after a grace period. Ranks on other machines show as an error of the
transport, and machines that are gone as node_heartbeat.py says.
"""

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from fttrain.util.errors import UserError
from fttrain.util.redact import redact

POLL_S = 0.5
GRACE_S = 5.0  # for the error path of a rank, from the end of a peer to the end of its process
PATIENCE_S = 2.0  # how long after an error its reason may take to show in the peers' files
DIED_EXIT_CODE = 4  # of a rank that ends because another one died
MESSAGE_BYTES = 2000  # what a file takes of a message: it fits a page, so it is read whole

# Held around what must not be cut short (a save); the thread waits for it before it ends anything.
uninterruptible = threading.Lock()

_LEFT, _FAILED = b"l", b"f"  # first byte of a file; the exit code and the message follow


class LivenessLock:
    """This rank's file in memory: locked while the process lives, empty until it leaves."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("fttrain rank", os.MFD_CLOEXEC)
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)  # not inherited by a forked child
        self.address = f"{_machine()} {os.getpid()} {self._descriptor}"

    def left(self) -> None:
        """The others have nothing to learn from the end of this rank."""
        os.pwrite(self._descriptor, _LEFT, 0)

    def failed(self, exit_code: int, message: str) -> None:
        """The others are to end with this."""
        said = _FAILED + bytes([exit_code & 0xFF or 1]) + message.encode()[:MESSAGE_BYTES]
        os.pwrite(self._descriptor, said, 0)

    def close(self) -> None:
        os.close(self._descriptor)


class Peer:
    """Another rank of this machine, seen through its file."""

    def __init__(self, rank: int, pid: str, descriptor: str) -> None:
        """Raises OSError where the system does not let this process look."""
        self.name = f"rank {rank} (pid {pid})"
        self._rank = rank
        self._descriptor = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def died(self) -> bool:
        """Whether its process is gone without a word."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        return not self._said()  # read after the lock was seen gone: nothing comes any more

    def failure(self) -> UserError | None:
        """What ended it, if that was an error of its own."""
        said = self._said()
        if said[:1] != _FAILED:
            return None
        return UserError(f"rank {self._rank}: {said[2:].decode(errors='ignore')}", said[1])

    def close(self) -> None:
        os.close(self._descriptor)

    def _said(self) -> bytes:
        return os.pread(self._descriptor, 2 + MESSAGE_BYTES, 0)


class PeerWatchdog:
    """Watches the peers from the start of a process group until ``close``."""

    def __init__(self, rank: int, mark: LivenessLock, addresses: Mapping[int, str]) -> None:
        """``addresses``: rank -> that of its mark, of all ranks of this machine."""
        self._mark = mark
        self._where = f"rank {rank}: " if rank else ""
        self._peers: list[Peer] = []
        for other, address in addresses.items():
            machine, pid, descriptor = address.rsplit(" ", 2)
            if other != rank and machine == _machine():
                with contextlib.suppress(OSError):
                    self._peers.append(Peer(other, pid, descriptor))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch peers", daemon=True)
        self._thread.start()

    def left(self) -> None:
        """This rank has done its part; it may end before or after the others."""
        self._mark.left()

    def failed(self, error: BaseException, meant: UserError | None = None) -> UserError | None:
        """What lies behind ``error`` on this rank: the end of a peer, else what is ``meant`` by it;
        None for its own fault.

        An error of its own is told to the peers, so call it before the connections to them go.
        """
        reason = None if isinstance(error, UserError) else self._reason_behind(error)
        if reason is not None:
            self._mark.left()
            return reason
        self._mark.failed(_exit_code(meant or error), _line(meant or error))
        return meant

    def end(self, reason: UserError) -> None:
        """End this process, and with it the peers, for ``reason``, once a save that is under way
        has come to its end.
        """
        with uninterruptible:
            self._mark.failed(_exit_code(reason), _line(reason))
            self._exit(reason)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._mark.close()
        for peer in self._peers:
            peer.close()

    def _reason_behind(self, error: BaseException) -> UserError | None:
        """Transports raise RuntimeError, and maybe before the peer's end shows here."""
        deadline = time.monotonic() + (PATIENCE_S if isinstance(error, RuntimeError) else 0)
        while (reason := self._bad_end()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return reason

    def _bad_end(self) -> UserError | None:
        """How peers ended, where one died or failed. A death explains failures, not vice versa."""
        dead = [peer.name for peer in self._peers if peer.died()]
        if dead:
            return UserError(
                f"{' and '.join(dead)} died without a word (killed? out of host memory? `dmesg` "
                "tells), so this rank stops too; checkpoints are whole, and the same command goes "
                "on from the newest",
                DIED_EXIT_CODE,
            )
        failures = (peer.failure() for peer in self._peers)
        return next((failure for failure in failures if failure is not None), None)

    def _watch(self) -> None:
        """The thread."""
        while not self._over.wait(POLL_S):
            if self._bad_end() is None:
                continue
            with (
                uninterruptible
            ):  # a save that is under way comes to its end, and the rank to its error
                pass
            if self._over.wait(GRACE_S):
                return
            with uninterruptible:
                self._end_process()

    def _end_process(self) -> None:
        reason = self._bad_end()
        if reason is None or self._over.is_set():
            return
        self._mark.left()
        self._exit(reason)

    def _exit(self, reason: UserError) -> None:
        line = f"fttrain: error: {self._where}{redact(_line(reason))}\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, line.encode())
        os._exit(reason.exit_code)


def _machine() -> str:
    """The same for processes that can find each other in /proc."""
    if not sys.platform.startswith("linux"):
        raise OSError("ranks are watched on Linux only")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
