"""A link of a given rate between ranks of one machine: network namespaces joined by a veth pair.

    rank 0 [fttrain-PID-0: veth0 10.77.0.1] ---- [fttrain-PID-1: veth0 10.77.0.2] rank 1

``tc tbf`` limits what each end sends. Only the network is divided: processes, files and memory are
the machine's, so ranks share a host copy as usual. Needs root, ``ip`` and ``tc``.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fttrain.util.errors import UserError

BURST_BYTES = 128 * 1024  # sent at full speed before the limit takes hold; 5 ms at 200 Mbit/s
QUEUE_MS = 50  # what waits longer is dropped


class Veth:
    """Two ranks, each in a namespace with one end of the pair."""

    interface, address = "veth0", "10.77.0.1"

    def __init__(self) -> None:
        self.namespaces = [f"fttrain-{os.getpid()}-{rank}" for rank in range(2)]

    def command(self, rank: int) -> list[str]:
        """What goes before the command of ``rank``; it replaces itself by that."""
        quiet = ["env", "TORCH_CPP_LOG_LEVEL=ERROR"]  # it warns that the address has no name
        return ["ip", "netns", "exec", self.namespaces[rank], *quiet]

    def limit(self, mbit: float | None) -> None:
        """Limit both directions to ``mbit`` million bits a second; None: as fast as it goes."""
        for name in self.namespaces:
            at = ["tc", "-n", name, "qdisc"]
            if mbit is None:
                _run([*at, "delete", "dev", self.interface, "root"], may_fail=True)
                continue
            rate = ["rate", f"{mbit}mbit", "burst", f"{BURST_BYTES}", "latency", f"{QUEUE_MS}ms"]
            _run([*at, "replace", "dev", self.interface, "root", "tbf", *rate])


@contextmanager
def veth_pair() -> Iterator[Veth]:
    """The pair, without a limit; it is gone after the block, whatever happens in it.

    Raises UserError where this machine does not let us.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UserError(f"a slow link needs `{missing[0]}` (package iproute2)")
    link = Veth()
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        try:
            _make(link)
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split())
            raise UserError(f"a slow link needs root (CAP_NET_ADMIN): {reason}") from None
        yield link
    finally:
        for name in link.namespaces:
            _run(["ip", "netns", "delete", name], may_fail=True)  # and with it the pair
        signal.signal(signal.SIGTERM, earlier)


def _make(link: Veth) -> None:
    first, second = link.namespaces
    for name in link.namespaces:
        _run(["ip", "netns", "add", name])
        _run(["ip", "-n", name, "link", "set", "lo", "up"])
    end = link.interface
    _run(["ip", "-n", first, "link", "add", end, "type", "veth", "peer", end, "netns", second])
    for number, name in enumerate(link.namespaces, start=1):
        _run(["ip", "-n", name, "address", "add", f"10.77.0.{number}/24", "dev", end])
        _run(["ip", "-n", name, "link", "set", end, "up"])
    link.limit(1)  # fails here, not after minutes, where the kernel has no tbf
    link.limit(None)


def _run(command: list[str], may_fail: bool = False) -> None:
    subprocess.run(command, check=not may_fail, capture_output=True, text=True)
