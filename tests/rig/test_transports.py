"""A process for each transport: what carried the bytes, and those that fail or hang."""

import os
import sys
from pathlib import Path

import pynvml
import pytest
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.rig import link_rank, transports
from fttrain.rig.transports import TRANSPORTS, LinkJob, Transport, carriers, is_as_asked
from fttrain.util.units import MIB

LINK_RANK = (sys.executable, "-m", "fttrain.training.link_rank")
CPU = torch.device("cpu")
BY_NAME = {transport.name: transport for transport in TRANSPORTS}
# As NCCL 2.27 writes them (src/transport/p2p.cc, shm.cc, net.cc; a log of two cards without peer
# access is in NVIDIA/nccl-tests, issue 307).
P2P = "rig:7:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM\n"
SHM = "rig:7:9 [0] NCCL INFO Channel 01 : 1[1] -> 0[0] via SHM/direct/direct\n"
P2P_READ = "rig:7:9 [0] NCCL INFO Channel 02/1 : 0[0] -> 1[1] via P2P/CUMEM/read\n"
NET_IB = "rig:7:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0(1)/GDRDMA(PCI)\n"
NET = "rig:7:9 [0] NCCL INFO Channel 00/0 : 1[1] -> 0[0] [receive] via NET/Socket/0\n"
OTHER = "rig:7:9 [0] NCCL INFO NET/Plugin: no plugin; 24 coll channels, 0 via nobody\n"


@pytest.mark.parametrize(
    ("log", "nvlink_bytes_per_s", "seen"),
    [
        (OTHER + P2P + P2P, None, "P2P/CUMEM"),
        (P2P, 1 << 30, "P2P/CUMEM over NVLink"),
        (P2P, 0, "P2P/CUMEM over PCIe"),
        (P2P, 3 * MIB, "P2P/CUMEM over PCIe"),  # what a bridge exchanges that nobody uses
        (P2P_READ + NET_IB, None, "NET/IB, P2P/CUMEM/read"),
        (SHM, 0, "SHM/direct/direct"),
        (NET + SHM, None, "NET/Socket, SHM/direct/direct"),
        (OTHER, None, "not in NCCL's log"),
    ],
)
def test_what_carried_the_bytes(log: str, nvlink_bytes_per_s: float | None, seen: str) -> None:
    assert carriers(log, nvlink_bytes_per_s) == seen


@pytest.mark.parametrize(
    ("name", "log", "as_asked"),
    [
        ("default", P2P, True),
        ("default", NET, True),
        ("no_p2p", SHM, True),
        ("no_p2p", P2P, False),
        ("sockets", NET, True),
        ("sockets", NET + SHM, False),
        ("sockets", OTHER, False),
    ],
)
def test_a_transport_that_is_another_one_is_told(name: str, log: str, as_asked: bool) -> None:
    assert is_as_asked(BY_NAME[name], carriers(log, None)) == as_asked


def test_which_transports_there_are() -> None:
    cuda = torch.device("cuda", 0)
    assert [found.name for found in transports.transports(CPU, "auto")] == ["gloo"]
    assert [found.name for found in transports.transports(cuda, "gloo")] == ["gloo"]
    assert [found.name for found in transports.transports(cuda, "auto")] == list(BY_NAME)


def test_a_gpu_that_is_missing_is_told_as_the_link_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(transports, "_taken_bytes", lambda device: 0)
    link, _ = transports.measure_transport(
        Transport("default", "nccl", {}),
        RankGroup(0, 1, 0, CPU),
        torch.device("cuda", 0),
        0,
        {},
        0,
        0.0,
        LINK_RANK,
    )
    assert link.wrong.startswith("it did not run: rig.backend=nccl: this machine has no GPU")
    assert link.samples == {}


def test_a_link_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transports, "START_S", 1.0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)  # the other one never comes
    job = LinkJob("cpu", "gloo", 1, "test", 0, {}, 0, 0.0, 0, str(tmp_path / "answer.json"))
    told = transports._run(LINK_RANK, job, {"MASTER_PORT": str(transports.free_port())}, tmp_path)
    assert told.startswith("no answer within 1 s: it hangs")


def test_what_a_user_reads_of_nccl_hides_no_carrier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NCCL says them under INIT alone (its other name for them is that of the transport)."""
    told: dict[str, str] = {}

    class Rank:
        def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
            told.update(env)

        def wait(self, limit_s: float = 0.0) -> int:
            return 0

        def kill(self) -> None: ...

    monkeypatch.setattr(transports.subprocess, "Popen", Rank)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("NCCL_DEBUG_SUBSYS", "COLL")
    job = LinkJob("cuda", "nccl", 1, "test", 0, {}, 0, 0.0, 0, "")
    assert transports._run(LINK_RANK, job, {}, tmp_path) == ""
    assert (told["NCCL_DEBUG"], told["NCCL_DEBUG_SUBSYS"]) == ("INFO", "INIT")


class SharedCard:
    """The driver of a card of 24 GiB on which two ranks have contexts of 500 and 300 MiB, and of
    which 1 GiB was gone before. ``pid``: of the process that it knows.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        free = (24 - 1) * 1024 * MIB - 800 * MIB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * 1024 * MIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * MIB)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        properties = type("Properties", (), {"uuid": "1234"})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        process = type("Process", (), {"pid": pid, "usedGpuMemory": 500 * MIB})
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: "card")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda card: [process])


@pytest.mark.parametrize(("known", "taken_mib"), [(True, 498), (False, 398)])
def test_a_shared_card_s_context_is_that_of_one_rank(
    known: bool, taken_mib: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the driver, where it knows the process; else the growth is divided."""
    SharedCard(monkeypatch, os.getpid() if known else 1)
    job = LinkJob("cuda", "gloo", 1, "", 0, {}, 0, 0.0, 1024 * MIB, str(tmp_path))
    assert link_rank._overhead_bytes(job, torch.device("cuda", 0), lambda: None) == taken_mib * MIB
