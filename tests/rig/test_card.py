"""Whose memory of a card is whose."""

import os

import pynvml
import pytest
import torch

from fttrain.rig import card
from fttrain.util.units import MIB

TOTAL = 24 * 1024 * MIB


class Driver:
    """That of a card on which this process has 500 MiB, 200 of them torch's, and a display 700."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pid: int, ranks: int) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        properties = type("Properties", (), {"uuid": "1234"})
        process = type("Process", (), {"pid": pid, "usedGpuMemory": 500 * MIB})
        for name, answer in {
            "mem_get_info": (TOTAL - 1200 * MIB, TOTAL),
            "memory_reserved": 200 * MIB,
            "get_device_properties": properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: "card")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda card: [process])


@pytest.mark.parametrize(
    ("known", "ranks", "beside_mib", "others_mib"),
    [
        (True, 1, 300, 700),
        (False, 1, 1000, None),  # a container hides processes from the driver
        (True, 2, 300, None),  # the other rank is no other program
        (False, 2, 400, None),
    ],
)
def test_what_is_beside_the_allocator_and_what_is_others(
    known: bool,
    ranks: int,
    beside_mib: int,
    others_mib: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Driver(monkeypatch, os.getpid() if known else 1, ranks)
    device = torch.device("cuda", 0)
    assert card.beside_allocator_bytes(device) == beside_mib * MIB
    expected = None if others_mib is None else others_mib * MIB
    assert card.others_bytes(device) == expected


@pytest.mark.cuda
def test_kernels_and_contexts_lie_beside_the_allocator() -> None:
    device = torch.device("cuda", 0)
    torch.ones(1, device=device)
    before = card.beside_allocator_bytes(device)
    assert 50 * MIB < before < 2048 * MIB
    held = torch.empty(1024 * MIB, dtype=torch.uint8, device=device)
    grown = card.beside_allocator_bytes(device) - before
    del held
    assert abs(grown) < 64 * MIB, "what the allocator gives out is not beside it"
    others = card.others_bytes(device)
    assert others is None or 0 <= others < torch.cuda.get_device_properties(device).total_memory
