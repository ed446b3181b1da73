"""The ledger of a rank's memory: every large part is reserved, compared with what the machine has,
and allocated under the same key.

    reserve(MemoryPart.HOST_LAYERS, 35 GB)   reserve(MemoryPart.LAYER_INPUTS, 5 GB) ...
    -> check() -> allocate(MemoryPart.HOST_LAYERS)

Reserving comes before anything is loaded, so a run that does not fit ends at once, with figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup, local_world_size
from fttrain.memory.device import free_device_bytes
from fttrain.memory.host import available_host_bytes
from fttrain.memory.parts import Location, MemoryPart
from fttrain.memory.pinned import map_private, map_shared
from fttrain.util.units import gib


@dataclass(frozen=True)
class Reservation:
    """Bytes of one part."""

    part: MemoryPart
    size_bytes: int

    @property
    def location(self) -> Location:
        """The location of the part."""
        return self.part.location


class MemoryLedger:
    """Reservations of one rank, and its big host buffers.

    Every rank makes the same calls in the same order.
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._reservations: dict[MemoryPart, Reservation] = {}

    @property
    def device(self) -> torch.device:
        """The rank's device."""
        return self._group.device

    @property
    def free_device_bytes(self) -> int:
        """Bytes that this rank can still allocate on its device."""
        return free_device_bytes(self.device, local_world_size())

    def reserve(self, part: MemoryPart, size_bytes: int) -> None:
        """Reserve ``size_bytes`` for ``part``; an earlier reservation of it is replaced. An empty
        part on the device is left out.
        """
        if size_bytes or part.location is not Location.DEVICE:
            self._reservations[part] = Reservation(part, size_bytes)

    @property
    def reservations(self) -> list[Reservation]:
        """All reservations of this rank."""
        return list(self._reservations.values())

    @property
    def device_bytes(self) -> int:
        """Bytes reserved on the device."""
        return sum(r.size_bytes for r in self.reservations if r.location is Location.DEVICE)

    def check(self) -> None:
        """Raise UserError, on all ranks alike, where a machine has too little free memory."""
        self._group.raise_everywhere(self._device_shortage())
        self._group.raise_everywhere(self._host_shortage())

    def _device_shortage(self) -> str:
        """An error text where this rank's card cannot hold the reserved parts, to which kernels and
        the allocator add; else "".
        """
        if self.device.type != "cuda":
            return ""
        needed, free = self.device_bytes, self.free_device_bytes
        if needed <= free:
            return ""
        on_device = [r for r in self.reservations if r.location is Location.DEVICE]
        return (
            f"rank {self._group.rank}: {gib(needed)} are needed on {self.device}, "
            f"{gib(free)} are free: {largest_parts(on_device)}"
        )

    def _host_shortage(self) -> str:
        """An error text where this machine has too little host memory, else "". Every rank calls
        it.
        """
        node, on_cpu = self._group.intra_node, self.device.type == "cpu"
        on_host = [r for r in self.reservations if on_cpu or r.location is not Location.DEVICE]
        private = sum(r.size_bytes for r in on_host if r.location is not Location.SHARED)
        shared = sum(r.size_bytes for r in on_host if r.location is Location.SHARED)
        # Ranks of one machine may reserve different bytes: each may hold other layers.
        needed = node.sum(private) + shared
        available = node.minimum(available_host_bytes())
        if needed <= available:
            return ""
        parts = ", ".join(f"{r.part.label} {gib(r.size_bytes)}{self._ranks_of(r)}" for r in on_host)
        where = f"machine {self._group.inter_node.rank}: " if node is not self._group else ""
        return (
            f"{where}host memory: {gib(needed)} are needed ({parts}), {gib(available)} are "
            "available; a smaller schedule.micro_batch_group, data.seq_len or "
            f"loop.micro_batch_size, {''.join(f'{setting}, ' for setting in self._host_settings())}"
            "or closing other programs helps"
        )

    def _host_settings(self, count: int = 3) -> list[str]:
        """Settings that shrink the largest parts in host memory, the most effective first."""
        on_host = [r for r in self.reservations if r.location is not Location.DEVICE]
        on_host.sort(key=lambda r: -r.size_bytes)
        return list(dict.fromkeys(r.part.shrink for r in on_host if r.part.shrink))[:count]

    def _ranks_of(self, reservation: Reservation) -> str:
        ranks = self._group.intra_node.world_size
        if ranks == 1:
            return ""
        return (
            " in all" if reservation.location is Location.SHARED else f" on each of {ranks} ranks"
        )

    def allocate(self, part: MemoryPart) -> Tensor:
        """The host buffer that was reserved for ``part``: uint8 (size_bytes,), zero; page-locked on
        CUDA.

        Raises UserError where the system refuses it.
        """
        size_bytes = self._reservations[part].size_bytes
        if part.location is Location.SHARED:
            memory = map_shared(self._group, part.label, size_bytes)
        else:
            memory = map_private(part.label, size_bytes)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        if self._group.device.type == "cuda":
            memory.page_lock(buffer, part.label, speak=self._group.intra_node.is_main)
        return buffer


def largest_parts(reservations: Sequence[Reservation], count: int = 3) -> str:
    """The ``count`` largest parts, with their GiB."""
    ordered = sorted(reservations, key=lambda reservation: -reservation.size_bytes)[:count]
    return ", ".join(f"{r.part.label} {gib(r.size_bytes)}" for r in ordered)
