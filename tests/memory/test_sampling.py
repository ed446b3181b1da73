"""Samples of a rank's memory."""

import mmap
from typing import Any

import psutil
import pytest
import torch

from fttrain.memory import sampling

CPU = torch.device("cpu")
MIB = 2**20
LAG_CYCLES = 10**9  # about half a second of a card


def test_a_sample_follows_what_this_process_holds() -> None:
    before = sampling.sample(CPU)
    assert before.keys() == {"host_resident_bytes", "host_peak_bytes", "host_free_bytes"}
    with mmap.mmap(-1, 256 * MIB) as pages:  # no allocator keeps these
        pages.write(bytes(256 * MIB))
        held = sampling.sample(CPU)
    after = sampling.sample(CPU)
    resident = [sample["host_resident_bytes"] for sample in (before, held, after)]
    assert resident[1] - resident[0] >= 255 * MIB
    assert resident[1] - resident[2] >= 255 * MIB
    assert resident[1] <= held["host_peak_bytes"]
    assert after["host_peak_bytes"] - after["host_resident_bytes"] >= 255 * MIB, "it is remembered"
    assert sampling.peak_device_bytes(CPU) == 0
    for sample in (before, held, after):
        assert 0 < sample["host_free_bytes"] < psutil.virtual_memory().total


class AllocatorStats:
    """torch's allocator statistics of a card that is not here: bytes given out, and their peak."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        for name, function in {
            "memory_stats": self._stats,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": self._reset,
            "mem_get_info": lambda device: (600, 1000),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(sampling, "_earlier_peaks_bytes", {})

    def hold(self, size_bytes: int) -> None:
        self.now = size_bytes
        self.peak = max(self.peak, size_bytes)

    def _stats(self, device: torch.device) -> dict[str, Any]:
        return {
            "allocated_bytes.all.current": self.now,
            "allocated_bytes.all.peak": self.peak,
            "reserved_bytes.all.current": 300,
        }

    def _reset(self, device: torch.device) -> None:
        self.peak = self.now


def test_peaks_begin_anew_and_the_highest_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, device = AllocatorStats(monkeypatch), torch.device("cuda", 0)
    recent, highest = [], []
    for sizes in ([10, 200, 20], [20, 90, 30], [], [250, 5]):
        for size_bytes in sizes:
            stats.hold(size_bytes)
        recent.append(sampling.sample(device))
        highest.append(sampling.peak_device_bytes(device))
    assert [sample["device_peak_bytes"] for sample in recent] == [200, 90, 30, 250]
    assert [sample["device_allocated_bytes"] for sample in recent] == [20, 30, 30, 5]
    assert highest == [200, 200, 200, 250]
    stats.hold(400)
    assert sampling.peak_device_bytes(device) == 400, "before anybody takes a sample of it"
    assert recent[0]["device_reserved_bytes"] == 300
    assert (recent[0]["device_used_bytes"], recent[0]["device_total_bytes"]) == (400, 1000)


@pytest.mark.cuda
def test_on_a_card_a_sample_knows_the_peak_and_waits_for_nothing() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    sampling.sample(device)
    first = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    before = sampling.sample(device)
    second = torch.ones(128 * MIB, dtype=torch.uint8, device=device)
    del second
    highest = sampling.peak_device_bytes(device)
    torch.cuda.synchronize()
    torch.cuda._sleep(LAG_CYCLES)
    done = torch.cuda.Event()
    done.record()
    after = sampling.sample(device)
    assert not done.query(), "the device was still at work"
    assert after["device_peak_bytes"] - before["device_allocated_bytes"] >= 128 * MIB
    assert after["device_allocated_bytes"] == before["device_allocated_bytes"] >= first.nbytes
    assert sampling.sample(device)["device_peak_bytes"] == after["device_allocated_bytes"]
    assert sampling.peak_device_bytes(device) == highest >= after["device_peak_bytes"]
    reserved, used, total = (after[f"device_{n}_bytes"] for n in ("reserved", "used", "total"))
    assert reserved <= used < total
