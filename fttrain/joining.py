"""How ranks come together: the process group of a run, its machines, and who watches whom."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as torch_dist

from fttrain.dist import COLLECTIVE_TIMEOUT, Group, local_world_size, rank_from_environment
from fttrain.machines import lost_connection, open_board
from fttrain.meeting import keeps_its_store, store_of_attempt
from fttrain.peers import Mark, Watch
from fttrain.util.errors import UserError


@contextmanager
def process_group(device: torch.device, backend: str = "auto") -> Iterator[Group]:
    """Joins the ranks for the length of the block, over ``backend``: nccl, gloo, or auto for NCCL
    between GPUs and gloo between CPUs. gloo between GPUs goes through host memory.

    Where a rank dies or fails inside the block the others of its machine end too, with its name:
    by UserError, or by the end of the process where they cannot be reached (see peers.py).
    """
    rank, world_size, local_rank = rank_from_environment()
    group = Group(rank, world_size, local_rank, device)
    if world_size == 1 or torch_dist.is_initialized():
        yield group
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    where: dict[str, Any] = {}
    if keeps_its_store():
        store = store_of_attempt(rank, world_size)
        where = {"store": store, "rank": rank, "world_size": world_size}
    device_id = device if backend == "nccl" else None
    torch_dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=device_id, **where)
    group = divided(group, local_world_size())
    watch = _watch(group.machine, group.rank)
    group = _with_board(group, watch)
    try:
        yield group
        watch.left()
        torch_dist.destroy_process_group()
    except BaseException as error:
        several = group.across.world_size > 1
        reason = watch.failed(error, lost_connection(error) if several else None)
        # It wakes the peers; NCCL's would wait for them, and the end of the process wakes them too.
        if backend == "gloo" and torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        if reason is not None:
            raise reason from error
        raise
    finally:
        if group.board is not None:
            group.board.close()
        watch.close()


def divided(group: Group, here: int) -> Group:
    """``group`` of all ranks with its ``machine`` and ``across``; ``here``: ranks on this machine.
    Every rank calls it.

    Raises UserError, on every rank, where ranks are not numbered machine by machine, as many on
    each.
    """
    places = group.gather([float(here), float(group.local_rank)])
    if all(count == group.world_size for count, _ in places):
        return group
    counts = {int(count) for count, _ in places}
    if len(counts) > 1 or group.world_size % here:
        raise UserError(
            f"{group.world_size} ranks, {' and '.join(map(str, sorted(counts)))} of them on a "
            "machine: as many on each machine are wanted (--nproc-per-node of torchrun, "
            "num_processes of accelerate)"
        )
    wrong = [rank for rank, (_, local) in enumerate(places) if rank % here != local]
    if wrong:
        raise UserError(
            f"rank {wrong[0]} is number {int(places[wrong[0]][1])} on its machine: ranks are to "
            f"be numbered machine by machine, {here} on each, as torchrun and accelerate do"
        )
    machines = group.world_size // here
    machine, place = divmod(group.rank, here)
    # All ranks make all of them, in the same order.
    rows = [_group_of(range(first * here, (first + 1) * here)) for first in range(machines)]
    columns = [_group_of(range(first, group.world_size, here)) for first in range(here)]
    local_rank, device = group.local_rank, group.device
    return replace(
        group,
        beside=Group(place, here, local_rank, device, rows[machine]),
        opposite=Group(machine, machines, local_rank, device, columns[place]),
    )


def _group_of(ranks: range) -> torch_dist.ProcessGroup:
    made: torch_dist.ProcessGroup = torch_dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT)
    return made


def _watch(machine: Group, rank: int) -> Watch:
    """Every rank watches its peers from here on. ``rank``: this one, among all."""
    mark, first = Mark(), rank - machine.rank
    addresses = {
        first + place: machine.share(mark.address, place) for place in range(machine.world_size)
    }
    watch = Watch(rank, mark, addresses)
    machine.barrier()  # each mark stays until all have opened it
    return watch


def _with_board(group: Group, watch: Watch) -> Group:
    """Every rank calls it."""
    if group.across.world_size == 1:
        return group
    names = group.of_machines(os.uname().nodename)
    session = group.share(secrets.token_hex(8))
    if not group.machine.is_main:
        return group
    return replace(group, board=open_board(session, group.across.rank, names, watch.end))
