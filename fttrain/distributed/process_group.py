"""How ranks come together: the process group of a run, its machines, and who watches whom."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as torch_dist

from fttrain.distributed.node_heartbeat import lost_connection, start_heartbeat
from fttrain.distributed.peer_watchdog import LivenessLock, PeerWatchdog
from fttrain.distributed.rank_group import (
    RankGroup,
    local_world_size,
    rank_from_environment,
)
from fttrain.distributed.rendezvous import agent_store_is_kept, attempt_store
from fttrain.distributed.timeouts import collective_timeout
from fttrain.util.errors import UserError


@contextmanager
def process_group(device: torch.device, backend: str = "auto") -> Iterator[RankGroup]:
    """Joins the ranks for the length of the block, over ``backend``: nccl, gloo, or auto for NCCL
    between GPUs and gloo between CPUs. gloo between GPUs goes through host memory.

    Where a rank dies or fails inside the block the others of its machine end too, with its name:
    by UserError, or by the end of the process where they cannot be reached (see peer_watchdog.py).
    """
    rank, world_size, local_rank = rank_from_environment()
    group = RankGroup(rank, world_size, local_rank, device)
    if world_size == 1 or torch_dist.is_initialized():
        yield group
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    where: dict[str, Any] = {}
    if agent_store_is_kept():
        store = attempt_store(rank, world_size)
        where = {"store": store, "rank": rank, "world_size": world_size}
    device_id = device if backend == "nccl" else None
    torch_dist.init_process_group(
        backend, timeout=collective_timeout(), device_id=device_id, **where
    )
    group = split_by_node(group, local_world_size())
    watchdog = _start_watchdog(group.intra_node, group.rank)
    group = _with_heartbeat(group, watchdog)
    try:
        yield group
        watchdog.left()
        torch_dist.destroy_process_group()
    except BaseException as error:
        several = group.inter_node.world_size > 1
        reason = watchdog.failed(error, lost_connection(error) if several else None)
        # It wakes the peers; NCCL's would wait for them, and the end of the process wakes them too.
        if backend == "gloo" and torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        if reason is not None:
            raise reason from error
        raise
    finally:
        if group.heartbeat is not None:
            group.heartbeat.close()
        watchdog.close()


def split_by_node(group: RankGroup, here: int) -> RankGroup:
    """``group`` of all ranks with its ``intra_node`` and ``inter_node``; ``here``: ranks on this
    machine. Every rank calls it.

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
    rows = [_new_group(range(first * here, (first + 1) * here)) for first in range(machines)]
    columns = [_new_group(range(first, group.world_size, here)) for first in range(here)]
    local_rank, device = group.local_rank, group.device
    return replace(
        group,
        intra=RankGroup(place, here, local_rank, device, rows[machine]),
        inter=RankGroup(machine, machines, local_rank, device, columns[place]),
    )


def _new_group(ranks: range) -> torch_dist.ProcessGroup:
    made: torch_dist.ProcessGroup = torch_dist.new_group(list(ranks), timeout=collective_timeout())
    return made


def _start_watchdog(machine: RankGroup, rank: int) -> PeerWatchdog:
    """Every rank watches its peers from here on. ``rank``: this one, among all."""
    mark, first = LivenessLock(), rank - machine.rank
    addresses = {
        first + place: machine.broadcast_str(mark.address, place)
        for place in range(machine.world_size)
    }
    watchdog = PeerWatchdog(rank, mark, addresses)
    machine.barrier()  # each mark stays until all have opened it
    return watchdog


def _with_heartbeat(group: RankGroup, watchdog: PeerWatchdog) -> RankGroup:
    """Every rank calls it."""
    if group.inter_node.world_size == 1:
        return group
    names = group.from_each_node(os.uname().nodename)
    session = group.broadcast_str(secrets.token_hex(8))
    if not group.intra_node.is_main:
        return group
    return replace(
        group, heartbeat=start_heartbeat(session, group.inter_node.rank, names, watchdog.end)
    )
