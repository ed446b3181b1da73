"""The rendezvous of ranks whose launcher may start them again.

torchrun's agents keep one store for all attempts of a run, with the keys of earlier attempts in it:
ranks would connect to addresses of ranks that are gone. So the ranks of an attempt agree on a name
for it and write all keys under that name. Agents start an attempt only once the one before has
ended everywhere, so every answer is of this attempt.

    rank r   hello/r = TOKEN              (overwrites that of an earlier attempt)
    rank 0   answer/TOKEN = NAME          for every hello it has not seen
    rank r   here/NAME/r                  once it has its answer; rank 0 waits for all of these
"""

import os
import secrets
import time
from typing import Any

import torch.distributed as torch_dist

from fttrain.distributed.timeouts import STORE_TIMEOUT

POLL_S = 0.1


def agent_store_is_kept() -> bool:
    """Whether the launcher has a store that outlives its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launcher_store() -> Any:
    """A connection to the launcher's store, which exists already."""
    stores: Any = torch_dist  # its type stubs lack them
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return stores.TCPStore(
        address, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False
    )


def attempt_store(rank: int, world_size: int) -> Any:
    """A part of the launcher's store that no earlier attempt has used, the same for all ranks.

    Returns once all ranks have it, however long one of them still prepares its data.
    """
    stores: Any = torch_dist
    store = stores.PrefixStore("fttrain", launcher_store())
    name = _name_for_all(store, world_size) if rank == 0 else _answer(store, rank)
    return stores.PrefixStore(name, store)


def _name_for_all(store: Any, world_size: int) -> str:
    """Name the attempt on rank 0, and wait until every rank has the name."""
    name, seen = secrets.token_hex(8), dict.fromkeys(range(1, world_size), b"")
    missing = set(seen)
    while missing:
        for rank in sorted(missing):
            if store.check([_here(name, rank)]):
                missing.remove(rank)
            elif store.check([_hello(rank)]) and (token := store.get(_hello(rank))) != seen[rank]:
                seen[rank] = token
                store.set(_answered(token.decode()), name)
        time.sleep(POLL_S)
    return name


def _answer(store: Any, rank: int) -> str:
    """The attempt's name, on the other ranks."""
    token = secrets.token_hex(8)
    store.set(_hello(rank), token)
    while not store.check([_answered(token)]):
        time.sleep(POLL_S)
    name: str = store.get(_answered(token)).decode()
    store.set(_here(name, rank), "")
    return name


def _hello(rank: int) -> str:
    return f"hello/{rank}"


def _answered(token: str) -> str:
    return f"answer/{token}"


def _here(name: str, rank: int) -> str:
    return f"here/{name}/{rank}"
