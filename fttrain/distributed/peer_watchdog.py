"""The watchdog over the ranks of a node: it ends this rank, with the reason, once another one has
died or failed.

A rank that dies leaves the others in a collective that never ends, or with an error of the
transport that names nobody. So each rank holds a lock on a small file in memory and writes there
how it leaves the process group; the others open that file. The kernel drops the lock however a
process ends: a file that is unlocked and empty is that of a rank that died. A stopped process
(SIGSTOP) keeps its lock and is not taken for dead.

An error that leaves the process group is explained by the peers' files (``PeerWatchdog.explain``).
No exception reaches a rank that stays in a collective, so a thread ends its process after a grace
period. The end of ranks on other nodes shows as an error of the transport, and the end of whole
nodes as node_heartbeat.py describes.
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
PATIENCE_S = 2.0  # from an error to the moment when its reason shows in the peers' files
DIED_EXIT_CODE = 4  # of a rank that ends because another one died
MESSAGE_BYTES = 2000  # of a message in a file: it fits a page, so a read never sees a half

# Held during a save, which must not be cut short: the thread takes it before it ends the process.
uninterruptible = threading.Lock()

_FINISHED, _FAILED = b"l", b"f"  # first byte of a file; the exit code and the message follow


class LivenessLock:
    """The file in memory of this rank: locked while the process lives, empty until it leaves."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("fttrain rank", os.MFD_CLOEXEC)
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)  # not inherited by a forked child
        self.address = f"{_process_space()} {os.getpid()} {self._descriptor}"

    def mark_finished(self) -> None:
        """Write that the end of this rank is no reason for the others to end."""
        os.pwrite(self._descriptor, _FINISHED, 0)

    def mark_failed(self, exit_code: int, message: str) -> None:
        """Write the exit code and the message with which the others are to end."""
        record = _FAILED + bytes([exit_code & 0xFF or 1]) + message.encode()[:MESSAGE_BYTES]
        os.pwrite(self._descriptor, record, 0)

    def close(self) -> None:
        os.close(self._descriptor)


class Peer:
    """Another rank of this node, seen through its file."""

    def __init__(self, rank: int, pid: str, descriptor: str) -> None:
        """Open the peer's file. Raises OSError where the system denies it."""
        self.name = f"rank {rank} (pid {pid})"
        self._rank = rank
        self._descriptor = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def died(self) -> bool:
        """Whether its process is gone and has written nothing."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        return not self._record()  # read after the lock was gone: nothing is written any more

    def failure(self) -> UserError | None:
        """The error that ended it, if it has failed by itself."""
        record = self._record()
        if record[:1] != _FAILED:
            return None
        return UserError(f"rank {self._rank}: {record[2:].decode(errors='ignore')}", record[1])

    def close(self) -> None:
        os.close(self._descriptor)

    def _record(self) -> bytes:
        return os.pread(self._descriptor, 2 + MESSAGE_BYTES, 0)


class PeerWatchdog:
    """The watch over the peers, from the start of a process group until ``close``."""

    def __init__(self, rank: int, lock: LivenessLock, addresses: Mapping[int, str]) -> None:
        """``addresses``: rank -> address of its lock, of all ranks of this node."""
        self._lock = lock
        self._prefix = f"rank {rank}: " if rank else ""
        self._peers: list[Peer] = []
        for other, address in addresses.items():
            space, pid, descriptor = address.rsplit(" ", 2)
            if other != rank and space == _process_space():
                with contextlib.suppress(OSError):
                    self._peers.append(Peer(other, pid, descriptor))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch peers", daemon=True)
        self._thread.start()

    def mark_finished(self) -> None:
        """Record that this rank has done its part; it may end before or after the others."""
        self._lock.mark_finished()

    def explain(self, error: BaseException, fallback: UserError | None = None) -> UserError | None:
        """The cause of ``error`` on this rank: the end of a peer, else ``fallback``; None where it
        is this rank's own fault.

        Without the end of a peer the error is recorded for the peers, so call it while they are
        still connected.
        """
        reason = None if isinstance(error, UserError) else self._reason_behind(error)
        if reason is not None:
            self._lock.mark_finished()
            return reason
        self._lock.mark_failed(_exit_code(fallback or error), _line(fallback or error))
        return fallback

    def abort_process(self, reason: UserError) -> None:
        """End this process, and with it the peers, for ``reason``; a save that is under way is
        finished first.
        """
        with uninterruptible:
            self._lock.mark_failed(_exit_code(reason), _line(reason))
            self._exit(reason)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._lock.close()
        for peer in self._peers:
            peer.close()

    def _reason_behind(self, error: BaseException) -> UserError | None:
        """The end of a peer that explains ``error``. A transport's RuntimeError may come before
        that end shows in the peer's file, so it is waited for.
        """
        deadline = time.monotonic() + (PATIENCE_S if isinstance(error, RuntimeError) else 0)
        while (reason := self._bad_end()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return reason

    def _bad_end(self) -> UserError | None:
        """The error for a peer that died, else for one that failed; None where all is well. A death
        explains failures, not the other way round.
        """
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
        """End this process once a peer has died or failed, in a thread."""
        while not self._closed.wait(POLL_S):
            if self._bad_end() is None:
                continue
            # A save that is under way is finished first; then the rank may meet its own error.
            with uninterruptible:
                pass
            if self._closed.wait(GRACE_S):
                return
            with uninterruptible:
                self._end_process()

    def _end_process(self) -> None:
        reason = self._bad_end()
        if reason is None or self._closed.is_set():
            return
        self._lock.mark_finished()
        self._exit(reason)

    def _exit(self, reason: UserError) -> None:
        line = f"fttrain: error: {self._prefix}{redact(_line(reason))}\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, line.encode())
        os._exit(reason.exit_code)


def _process_space() -> str:
    """A name that is the same for processes that can find each other in /proc."""
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
