"""The helper that other tests stand on: it must see a rank fail, hang and die."""

import os
import signal
import time

import pytest
import torch
import torch.distributed
from ranks import run_ranks


def add_up(base: int) -> tuple[int, torch.Tensor]:
    rank = torch.distributed.get_rank()
    total = torch.tensor([base + rank])
    torch.distributed.all_reduce(total)
    return rank, total


def misbehave(how: str) -> None:
    if torch.distributed.get_rank() == 1:
        if how == "raise":
            raise ValueError("of rank one")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    torch.distributed.barrier()


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(add_up, 2, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.tolist() == [21] for _, total in results)


def test_a_failing_rank_raises_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*misbehave.*of rank one"):
        run_ranks(misbehave, 2, "raise")


def test_a_killed_rank_raises() -> None:
    with pytest.raises(RuntimeError, match=r"rank [01]"):
        run_ranks(misbehave, 2, "die")


def test_a_hanging_rank_runs_into_the_limit() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_ranks(misbehave, 2, "hang", timeout_s=8)
