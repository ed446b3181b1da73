"""How a rank sets itself up."""

from typing import Any

import pytest
import torch

from fttrain.memory.device import free_device_bytes, is_out_of_memory
from fttrain.memory.host import peak_host_bytes
from fttrain.rig.config import RigConfig
from fttrain.rig.device_setup import set_up
from fttrain.util.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "rig.device=tpu: auto, cpu or cuda"),
        ({"threads": 0}, "rig.threads=0"),
        ({"backend": "mpi"}, "rig.backend=mpi: auto, nccl, gloo"),
        ({"backend": "nccl", "device": "cpu"}, "rig.backend=nccl: it needs a GPU"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RigConfig(**settings)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_as_asked_for(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        assert set_up(RigConfig("cpu", threads), 0, 1) == torch.device("cpu")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, processes in ((0, 1), (1, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(UserError, match=rf"needs GPU {processes - 1}, there are {gpus}"):
            set_up(RigConfig("cuda"), processes - 1, processes)
    with pytest.raises(UserError, match=r"launch.processes=2: this machine has 1 GPU"):
        set_up(RigConfig("auto"), 0, 2)


def test_nccl_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"rig.backend=nccl: this machine has no GPU"):
        set_up(RigConfig(backend="nccl"), 0, 1)


def test_over_gloo_ranks_share_a_gpu_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    for name, found in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": chosen.append,
        "mem_get_info": lambda device: (600, 1000),
        "get_per_process_memory_fraction": lambda device: 1.0,
        "memory_reserved": lambda device: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)
    threads = torch.get_num_threads()
    for local_rank in range(3):
        set_up(RigConfig("cuda", threads, backend="gloo"), local_rank, 3)
    assert [device.index for device in chosen] == [0, 1, 0]
    assert [free_device_bytes(chosen[0], ranks) for ranks in (1, 2, 3, 4)] == [600, 600, 300, 300]


def test_peak_memory_grows_with_what_is_touched() -> None:
    before = peak_host_bytes()
    assert 10**7 < before < 10**12
    size_bytes = before + 50 * 2**20  # more than this process has ever held
    torch.ones(min(size_bytes, 2 * 2**30) // 4)
    assert peak_host_bytes() >= min(size_bytes, 2 * 2**30)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        # NCCL before 2.19, and since
        (RuntimeError("unhandled cuda error\nLast error:\nCuda failure 'out of memory'"), True),
        (RuntimeError("unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("unhandled cuda error\nCuda failure 999 'unknown error'"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError(), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_cpu_allocators_error_counts() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)
    assert is_out_of_memory(found.value)
