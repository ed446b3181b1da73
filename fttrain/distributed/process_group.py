"""The process group of a run: its ranks, its nodes, the watchdog and the heartbeat."""

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
    """Join the ranks for the length of the block, over ``backend``: nccl, gloo, or auto for NCCL
    between GPUs and gloo between CPUs. gloo between GPUs goes through host memory.

    Where a rank dies or fails inside the block, the others of its node end too, with its name: by
    UserError, or by the end of the process where no exception can reach them (peer_watchdog.py).
    """
    rank, world_size, local_rank = rank_from_environment()
    group = RankGroup(rank, world_size, local_rank, device)
    if world_size == 1 or torch_dist.is_initialized():
        yield group
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    rendezvous: dict[str, Any] = {}
    if agent_store_is_kept():
        store = attempt_store(rank, world_size)
        rendezvous = {"store": store, "rank": rank, "world_size": world_size}
    device_id = device if backend == "nccl" else None
    torch_dist.init_process_group(
        backend, timeout=collective_timeout(), device_id=device_id, **rendezvous
    )
    group = split_by_node(group, local_world_size())
    watchdog = _start_watchdog(group.intra_node, group.rank)
    group = _with_heartbeat(group, watchdog)
    try:
        yield group
        watchdog.mark_finished()
        torch_dist.destroy_process_group()
    except BaseException as error:
        several = group.inter_node.world_size > 1
        reason = watchdog.explain(error, lost_connection(error) if several else None)
        # This wakes the peers. NCCL's would wait for them; the end of the process wakes them, too.
        if backend == "gloo" and torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        if reason is not None:
            raise reason from error
        raise
    finally:
        if group.heartbeat is not None:
            group.heartbeat.close()
        watchdog.close()


def split_by_node(group: RankGroup, local_world_size: int) -> RankGroup:
    """``group`` of all ranks, with its ``intra_node`` and ``inter_node``. Every rank calls it.

    ``local_world_size``: ranks on this node. Raises UserError, on every rank, where ranks are not
    numbered node by node, as many on each.
    """
    ranks = group.gather([float(local_world_size), float(group.local_rank)])
    if all(count == group.world_size for count, _ in ranks):
        return group
    counts = {int(count) for count, _ in ranks}
    if len(counts) > 1 or group.world_size % local_world_size:
        raise UserError(
            f"{group.world_size} ranks, {' and '.join(map(str, sorted(counts)))} of them on a "
            "machine: as many on each machine are wanted (--nproc-per-node of torchrun, "
            "num_processes of accelerate)"
        )
    wrong = [rank for rank, (_, local) in enumerate(ranks) if rank % local_world_size != local]
    if wrong:
        raise UserError(
            f"rank {wrong[0]} is number {int(ranks[wrong[0]][1])} on its machine: ranks are to be "
            f"numbered machine by machine, {local_world_size} on each, as torchrun and accelerate "
            "do"
        )
    return _with_subgroups(group, local_world_size)


def _with_subgroups(group: RankGroup, local_world_size: int) -> RankGroup:
    nodes = group.world_size // local_world_size
    node, local_rank = divmod(group.rank, local_world_size)
    # Every rank makes all of these groups, in the same order.
    of_nodes = [
        _new_group(range(first, first + local_world_size))
        for first in range(0, group.world_size, local_world_size)
    ]
    across_nodes = [
        _new_group(range(first, group.world_size, local_world_size))
        for first in range(local_world_size)
    ]
    device = group.device
    return replace(
        group,
        intra=RankGroup(local_rank, local_world_size, local_rank, device, of_nodes[node]),
        inter=RankGroup(node, nodes, local_rank, device, across_nodes[local_rank]),
    )


def _new_group(ranks: range) -> torch_dist.ProcessGroup:
    timeout = collective_timeout()
    group: torch_dist.ProcessGroup = torch_dist.new_group(list(ranks), timeout=timeout)
    return group


def _start_watchdog(node: RankGroup, rank: int) -> PeerWatchdog:
    """The watchdog over the ranks of ``node``, started. ``rank``: this one, among all ranks."""
    lock, first = LivenessLock(), rank - node.rank
    addresses = {
        first + local_rank: node.broadcast_str(lock.address, local_rank)
        for local_rank in range(node.world_size)
    }
    watchdog = PeerWatchdog(rank, lock, addresses)
    node.barrier()  # each file must stay until all have opened it
    return watchdog


def _with_heartbeat(group: RankGroup, watchdog: PeerWatchdog) -> RankGroup:
    """``group`` with a heartbeat on the first rank of each node, if there are several. All ranks
    call it.
    """
    if group.inter_node.world_size == 1:
        return group
    names = group.from_each_node(os.uname().nodename)
    session = group.broadcast_str(secrets.token_hex(8))
    if not group.intra_node.is_main:
        return group
    node, abort = group.inter_node.rank, watchdog.abort_process
    return replace(group, heartbeat=start_heartbeat(session, node, names, abort))
