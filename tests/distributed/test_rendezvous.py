"""Ranks of a new attempt meet over a store that still has all that an earlier one left there."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as torch_dist

from fttrain.distributed import rendezvous

RANKS = 4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the launcher, which outlives its ranks."""
    stores: Any = torch_dist
    made = stores.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(made.port))
    return made


def attempt(pool: ThreadPoolExecutor, late: int) -> list[Any]:
    """The store of each rank. ``late`` begins when the others wait already."""
    joining = {
        rank: pool.submit(rendezvous.attempt_store, rank, RANKS)
        for rank in sorted(range(RANKS), key=lambda rank: rank == late)
        if rank != late
    }
    done = [future.done() for future in joining.values()]
    assert not any(done)
    joining[late] = pool.submit(rendezvous.attempt_store, late, RANKS)
    return [joining[rank].result(timeout=60) for rank in range(RANKS)]


@pytest.mark.parametrize("late", [0, 2])
def test_nothing_of_an_earlier_attempt_is_seen(late: int, server: Any) -> None:
    with ThreadPoolExecutor(RANKS) as pool:
        for number in range(3):
            stores = attempt(pool, late)
            assert not stores[0].check(["address"])
            stores[0].set("address", str(number))
            stores[0].wait(["address"])
            assert {store.get("address") for store in stores} == {str(number).encode()}


def test_a_rank_that_died_while_it_waited_is_not_counted(server: Any) -> None:
    """It has said hello, and its successor says it again."""
    stores: Any = torch_dist
    stores.PrefixStore("fttrain", rendezvous.launcher_store()).set(rendezvous._hello(1), "dead")
    with ThreadPoolExecutor(RANKS) as pool:
        first = pool.submit(rendezvous.attempt_store, 0, 2)
        with pytest.raises(TimeoutError):
            first.result(timeout=1)
        second = pool.submit(rendezvous.attempt_store, 1, 2)
        for store in (first.result(timeout=60), second.result(timeout=60)):
            store.set("key", "same")
            assert store.get("key") == b"same"
