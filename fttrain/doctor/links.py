"""Checks of the links between ranks and between cards: correct results within a time limit."""

import torch

from fttrain.doctor.finding import NOT_AVAILABLE, Finding, failure, ok
from fttrain.doctor.processes import run_module
from fttrain.util.units import MIB

PROBE = "fttrain.doctor.link_probe"
SIZE_BYTES = 16 * MIB
LIMIT_S = 90.0  # for the imports, the first connection and six exchanges; a slow machine takes 20
REMEDIES = {
    "gloo": "export GLOO_SOCKET_IFNAME=lo, and let 127.0.0.1 through the firewall",
    "nccl": "export NCCL_P2P_DISABLE=1 (NCCL_DEBUG=INFO says more); rig.backend=gloo does without",
}


def all_reduce(backend: str, kind: str, limit_s: float = LIMIT_S, probe: str = PROBE) -> Finding:
    """An all_reduce of known values between two ranks, fresh processes on ``kind`` devices."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        return ok(f"{NOT_AVAILABLE}: NCCL needs two cards")
    arguments = ["all_reduce", backend, kind, str(SIZE_BYTES)]
    outcome = run_module(probe, arguments, 2, limit_s)
    if outcome.problem:
        return failure(outcome.problem, REMEDIES[backend])
    return ok(f"two ranks, {_rate(float(outcome.answer))}, the sum is right")


def peer_copy(cards: int, limit_s: float = LIMIT_S, probe: str = PROBE) -> Finding:
    """Copies both ways between every two of ``cards``: where a driver claims peer access without
    having it, they hang or deliver wrong bytes.
    """
    if cards < 2:
        return ok(f"{NOT_AVAILABLE}: it needs two cards")
    rates = []
    for source in range(cards):
        for target in set(range(cards)) - {source}:
            arguments = ["copy", str(source), str(target), str(SIZE_BYTES)]
            outcome = run_module(probe, arguments, 1, limit_s)
            if outcome.problem:
                return failure(
                    f"card {source} to card {target}: {outcome.problem}",
                    "export NCCL_P2P_DISABLE=1; in the BIOS ACS off; a newer driver",
                )
            peer = torch.cuda.can_device_access_peer(source, target)
            how = "peer access" if peer else "through the host"
            rates.append(f"{source} to {target} {_rate(float(outcome.answer))}, {how}")
    return ok("; ".join(rates))


def _rate(seconds: float) -> str:
    return f"{SIZE_BYTES / MIB:.0f} MiB at {SIZE_BYTES / seconds / 1e9:.2f} GB/s"
