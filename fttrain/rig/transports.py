"""Transports between ranks, each measured in processes of its own: NCCL reads its environment
once.

    this rank ── COMMAND JOB, in the transport's environment ──> its answer

Each rank starts one such process and waits for it. What really carried the bytes is read from
NCCL's own log and from the driver's NVLink counters.
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
from fttrain.launcher.launch import PARENT_PID, free_port
from fttrain.rig.profile import LinkProfile, LinkSample
from fttrain.util.units import MIB

START_S = 120.0  # for the imports, the first collective, and a slow first size
GRACE = 4.0  # how many times its budget a transport may take before it counts as hanging
# Less is the link's own: two RTX 3090 at rest exchange 1.2 MiB/s (Syllo/nvtop, pull request 469)
_NVLINK_LEAST_BYTES_PER_S = 8 * MIB


@dataclass(frozen=True)
class Transport:
    """How ranks are asked to talk."""

    name: str  # as in ``LinkProfile.transport``
    backend: str  # nccl | gloo
    environment: Mapping[str, str]
    carriers: tuple[str, ...] = ()  # the only ones that NCCL's log may name; (): any


TRANSPORTS = (
    Transport("default", "nccl", {}),
    Transport("no_p2p", "nccl", {"NCCL_P2P_DISABLE": "1"}, ("SHM", "NET")),
    Transport("sockets", "nccl", {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}, ("NET",)),
    Transport("gloo", "gloo", {}),
)


@dataclass(frozen=True)
class LinkJob:
    """What ``link_rank`` is told."""

    device: str  # cpu | cuda
    backend: str
    threads: int
    label: str  # for its progress
    layers: int  # of the model
    true_bytes: dict[str, int]  # by collective
    most_bytes: int
    budget_s: float
    taken_bytes: int  # of the card, by all programs, before the process was there
    answer: str  # file that it writes


def transports(device: torch.device, backend: str) -> list[Transport]:
    """Those that ranks on ``device`` have. ``backend``: as rig.backend."""
    only = "gloo" if device.type == "cpu" or backend == "gloo" else ""
    return [found for found in TRANSPORTS if only in ("", found.backend)]


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
    """The link, and the bytes of this rank's card that it takes beside tensors (context, buffers of
    the transport; on the CPU the process with its libraries), None where it failed.

    ``group``: the ranks that start the processes; every rank calls it, and gets the same link. One
    that fails, hangs or corrupts is told in ``wrong``.
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
            answer=str(folder / "answer.json"),
        )
        problem = _run(command, job, {**transport.environment, "MASTER_PORT": port}, folder)
        answer = {} if problem else json.loads(Path(job.answer).read_text())
        seen = _seen(transport, folder, answer.get("nvlink_bytes_per_s"))
    problems = [group.broadcast_str(problem, rank) for rank in range(group.world_size)]
    wrong = next((told for told in problems if told), "") or answer["wrong"]
    seen = group.broadcast_str(seen)
    link = LinkProfile(
        transport.name,
        seen,
        group.world_size,
        {} if wrong else _samples(answer["samples"]),
        wrong,
        bool(wrong) or is_as_asked(transport, seen),
        None if wrong else answer["gradients_s"],
    )
    return link, answer.get("overhead_bytes")


def _run(command: Sequence[str], job: LinkJob, variables: Mapping[str, str], folder: Path) -> str:
    """What went wrong; "" where an answer is there."""
    environment = {
        **os.environ,
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT",  # in which it names carriers, whatever the user wants to read
        "NCCL_DEBUG_FILE": str(folder / "nccl.log"),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **variables,
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # accelerate's store is not at the new port
        PARENT_PID: str(os.getpid()),
    }
    limit_s = START_S + GRACE * job.budget_s
    errors = folder / "stderr"
    with open(errors, "w") as stream:
        rank = subprocess.Popen(
            [*command, json.dumps(asdict(job))],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=stream,
        )
        try:
            code = rank.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"no answer within {limit_s:.0f} s: it hangs, or needs a larger rig.link_s"
        finally:
            rank.kill()
            rank.wait()
    if code == 0:
        return ""
    said = errors.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    return f"it did not run: {said[-1].removeprefix('fttrain: error: ')}"


def _samples(found: Mapping[str, Any]) -> dict[str, tuple[LinkSample, ...]]:
    return {
        name: tuple(LinkSample(*sample) for sample in samples) for name, samples in found.items()
    }


def _seen(transport: Transport, folder: Path, nvlink_bytes_per_s: float | None) -> str:
    if transport.backend == "gloo":
        return f"TCP on {gloo_interface()}"
    log = folder / "nccl.log"
    return carriers(log.read_text(errors="replace") if log.is_file() else "", nvlink_bytes_per_s)


def carriers(log: str, nvlink_bytes_per_s: float | None) -> str:
    """What NCCL's log names, such as "P2P/CUMEM over NVLink".

    ``nvlink_bytes_per_s``: how fast the card's counters grew meanwhile; None: it has none.
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
    """Whether every carrier of ``seen`` is one that the transport's name stands for."""
    named = re.findall(r"\b(P2P|SHM|NET)\b", seen)
    return not transport.carriers or (bool(named) and set(named) <= set(transport.carriers))


def gloo_interface() -> str:
    """The network interface that gloo binds to: GLOO_SOCKET_IFNAME, or that of the host's name."""
    if name := os.environ.get("GLOO_SOCKET_IFNAME"):
        return name
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "the loopback interface"  # gloo takes it where the name has no address
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address == address for own in addresses):
            return name
    return address


def _taken_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
