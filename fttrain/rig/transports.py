"""Transports between ranks, each measured in processes of its own: NCCL reads its environment
once.

    this rank ── COMMAND JOB, in the transport's environment ──> its answer

Each rank starts one such process and waits for it. The carrier of the bytes is read from NCCL's log
and from the driver's NVLink counters.
"""

import json
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.launcher.environment import PARENT_PID
from fttrain.launcher.launch import free_port
from fttrain.rig.profile import LinkProfile, LinkSample
from fttrain.util.units import MIB

START_S = 120.0  # for imports, the first collective, and a slow first size
GRACE = 4.0  # times its budget: a transport that takes longer counts as hanging
# Background traffic is below this: two RTX 3090 at rest exchange 1.2 MiB/s (Syllo/nvtop, pull
# request 469)
_NVLINK_LEAST_BYTES_PER_S = 8 * MIB


@dataclass(frozen=True)
class Transport:
    """A way for ranks to communicate."""

    name: str  # as in ``LinkProfile.transport``
    backend: str  # nccl | gloo
    environment: Mapping[str, str]
    carriers: tuple[str, ...] = ()  # allowed carriers in NCCL's log; (): any


TRANSPORTS = (
    Transport("default", "nccl", {}),
    Transport("no_p2p", "nccl", {"NCCL_P2P_DISABLE": "1"}, ("SHM", "NET")),
    Transport("sockets", "nccl", {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}, ("NET",)),
    Transport("gloo", "gloo", {}),
)


@dataclass(frozen=True)
class LinkJob:
    """The input of ``link_rank``."""

    device: str  # cpu | cuda
    backend: str
    threads: int
    label: str  # of the progress bar
    layers: int  # of the model
    true_bytes: dict[str, int]  # by collective
    most_bytes: int
    budget_s: float
    taken_bytes: int  # of the card, used by all programs before the process started
    result_file: str  # path, written by the process


def transports(device: torch.device, backend: str) -> list[Transport]:
    """The transports of ranks on ``device``. ``backend``: as rig.backend."""
    backend_only = "gloo" if device.type == "cpu" or backend == "gloo" else ""
    return [transport for transport in TRANSPORTS if backend_only in ("", transport.backend)]


def measure_transport(
    transport: Transport,
    group: RankGroup,
    device: torch.device,
    layers: int,
    true_bytes: dict[str, int],
    most_bytes: int,
    budget_s: float,
    command: Sequence[str],
) -> tuple[LinkProfile, int | None]:
    """(link, bytes of this rank's card outside tensors: context and buffers of the transport; on
    the CPU the process with its libraries; None where the link failed).

    group: the ranks that start the processes; every rank calls it and gets the same link.
    command: starts ``link_rank.main`` with the job as JSON appended.

    A link that fails, hangs or corrupts has the reason in ``wrong``.
    """
    port = group.broadcast_str(str(free_port()))
    with tempfile.TemporaryDirectory(prefix="fttrain-link-") as name:
        folder = Path(name)
        job = LinkJob(
            device=device.type,
            backend=transport.backend,
            threads=torch.get_num_threads(),
            label=f"link, {transport.name}",
            layers=layers,
            true_bytes=true_bytes,
            most_bytes=most_bytes,
            budget_s=budget_s,
            taken_bytes=_taken_bytes(device),
            result_file=str(folder / "result.json"),
        )
        problem = _run(command, job, {**transport.environment, "MASTER_PORT": port}, folder)
        result = {} if problem else json.loads(Path(job.result_file).read_text())
        seen = _seen(transport, folder, result.get("nvlink_bytes_per_s"))
    problems = [group.broadcast_str(problem, rank) for rank in range(group.world_size)]
    fault = next((text for text in problems if text), "") or result["wrong"]
    seen = group.broadcast_str(seen)
    link = LinkProfile(
        transport.name,
        seen,
        group.world_size,
        {} if fault else _samples(result["samples"]),
        fault,
        bool(fault) or is_as_asked(transport, seen),
        None if fault else result["gradients_s"],
    )
    return link, result.get("overhead_bytes")


def _run(command: Sequence[str], job: LinkJob, variables: Mapping[str, str], folder: Path) -> str:
    """Run the process of ``job``; return what went wrong, "" where the result is there."""
    environment = {
        **os.environ,
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT",  # names the carriers, whatever the user's own setting
        "NCCL_DEBUG_FILE": str(folder / "nccl.log"),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **variables,
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # accelerate's store is not at the new port
        PARENT_PID: str(os.getpid()),
    }
    limit_s = START_S + GRACE * job.budget_s
    errors = folder / "stderr"
    with open(errors, "w") as stream:
        process = subprocess.Popen(
            [*command, json.dumps(asdict(job))],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=stream,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"no answer within {limit_s:.0f} s: it hangs, or needs a larger rig.link_s"
        finally:
            process.kill()
            process.wait()
    if code == 0:
        return ""
    lines = errors.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    return f"it did not run: {lines[-1].removeprefix('fttrain: error: ')}"


def _samples(by_collective: Mapping[str, Any]) -> dict[str, tuple[LinkSample, ...]]:
    return {
        name: tuple(LinkSample(*sample) for sample in samples)
        for name, samples in by_collective.items()
    }


def _seen(transport: Transport, folder: Path, nvlink_bytes_per_s: float | None) -> str:
    if transport.backend == "gloo":
        return f"TCP on {gloo_interface()}"
    log = folder / "nccl.log"
    return carriers(log.read_text(errors="replace") if log.is_file() else "", nvlink_bytes_per_s)


def carriers(log: str, nvlink_bytes_per_s: float | None) -> str:
    """The carriers in NCCL's log, such as "P2P/CUMEM over NVLink".

    ``nvlink_bytes_per_s``: the growth of the card's counters meanwhile; None: it has none.
    """
    # NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM, SHM/direct/direct, NET/Socket/0/GDRDMA
    named = sorted(set(re.findall(r"Channel \S+ : .* via ((?:P2P|SHM|NET)(?:/[A-Za-z]+)*)", log)))
    if not named:
        return "not in NCCL's log"
    text = ", ".join(named)
    if nvlink_bytes_per_s is None or not any(name.startswith("P2P") for name in named):
        return text
    over = "NVLink" if nvlink_bytes_per_s >= _NVLINK_LEAST_BYTES_PER_S else "PCIe"
    return f"{text} over {over}"


def is_as_asked(transport: Transport, seen: str) -> bool:
    """Whether every carrier in ``seen`` is one that the transport allows."""
    named = re.findall(r"\b(P2P|SHM|NET)\b", seen)
    return not transport.carriers or (bool(named) and set(named) <= set(transport.carriers))


def gloo_interface() -> str:
    """The network interface that gloo binds to: GLOO_SOCKET_IFNAME, or that of the host name."""
    if name := os.environ.get("GLOO_SOCKET_IFNAME"):
        return name
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "the loopback interface"  # gloo uses it where the name has no address
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return address


def _taken_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
