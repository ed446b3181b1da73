"""What ranks say to each other, on one rank and on two."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from ranks import run_ranks

from fttrain.distributed.process_group import process_group
from fttrain.distributed.rank_group import RankGroup, rank_from_environment
from fttrain.rig.config import RigConfig
from fttrain.rig.device_setup import set_up_rank

CPU = torch.device("cpu")
TEXTS = ["", "abc", "ä→𝄞\n" * 1000]
SENT = {
    "codes": torch.arange(256, dtype=torch.uint8),
    "step": torch.tensor(7.0),
    "weights": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
}
HEARD = {name: ("cpu", tensor.dtype, tensor.tolist()) for name, tensor in SENT.items()}
TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
PLACES = [
    ("cpu", "auto"),
    pytest.param("cuda", "nccl", marks=[pytest.mark.cuda, TWO_CARDS]),
    pytest.param("cuda", "gloo", marks=pytest.mark.cuda),
]


def talk(device: str = "cpu", backend: str = "auto") -> dict[str, Any]:
    """What this rank hears."""
    config = RigConfig(device, threads=1, backend=backend)
    where = CPU if device == "cpu" else set_up_rank(config)
    with process_group(where, backend) as group:
        rank = group.rank
        heard = {
            "group": (rank, group.world_size, group.local_rank, group.is_main),
            "sum": group.all_reduce_(torch.tensor([1.0, 10.0]).to(where) * (rank + 1)).tolist(),
            "any": [group.any(flag) for flag in (False, rank == 0, rank == 1, True)],
            "all": [group.all(flag) for flag in (False, rank == 0, rank == 1, True)],
            "maximum": [group.maximum(value) for value in (float(rank), -1.5 - rank)],
            "share": [group.broadcast_str(text if group.is_main else "mine") for text in TEXTS],
            "sent": {
                name: (tensor.device.type, tensor.dtype, tensor.tolist())
                for name, tensor in group.broadcast_tensors(SENT if group.is_main else {})
            },
        }
        group.barrier()
    heard["left"] = not torch_dist.is_initialized()
    return heard


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_two_ranks(device: str, backend: str) -> None:
    for rank, heard in enumerate(run_ranks(talk, 2, device, backend, process_group=False)):
        assert heard == {
            "group": (rank, 2, rank, rank == 0),
            "sum": [3.0, 30.0],
            "any": [False, True, True, True],
            "all": [False, False, False, True],
            "maximum": [1.0, -1.5],
            "share": TEXTS,
            "sent": HEARD,
            "left": True,
        }


def test_one_rank_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert rank_from_environment() == (0, 1, 0)
    heard = talk()
    assert heard["group"] == (0, 1, 0, True)
    assert heard["sum"] == [1.0, 10.0]
    assert heard["any"] == [False, True, False, True]
    assert heard["share"] == TEXTS


@pytest.mark.parametrize(
    ("device", "backend", "expected", "device_id"),
    [
        ("cpu", "auto", "gloo", None),
        ("cuda:1", "auto", "nccl", torch.device("cuda:1")),
        ("cuda:1", "nccl", "nccl", torch.device("cuda:1")),
        ("cuda:1", "gloo", "gloo", None),
    ],
)
def test_ranks_join_over_the_backend_that_was_chosen(
    device: str,
    backend: str,
    expected: str,
    device_id: torch.device | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Joined(Exception):
        """As far as it goes here."""

    def join(backend: str, timeout: object, device_id: torch.device | None) -> None:
        raise Joined(backend, device_id)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch_dist, "init_process_group", join)
    with pytest.raises(Joined) as joined, process_group(torch.device(device), backend):
        pass
    assert joined.value.args == (expected, device_id)


def test_rank_as_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setitem(os.environ, name, value)
    assert rank_from_environment() == (3, 4, 1)
    assert not RankGroup(3, 4, 1, CPU).is_main
