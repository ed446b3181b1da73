"""The measurements of ``fttrain measure``, put together into a ``RigProfile``."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from fttrain.distributed.rank_group import RankGroup, local_world_size
from fttrain.memory.device import ranks_a_device
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.rig import machine, topology
from fttrain.rig.card import others_bytes
from fttrain.rig.compute import (
    adamw_values_per_s,
    dequantise_bytes_per_s,
    gemm_flop_per_s,
    memory_bytes_per_s,
)
from fttrain.rig.copies import copy_rates
from fttrain.rig.disk import disk_bytes_per_s
from fttrain.rig.link import MOST_BYTES
from fttrain.rig.profile import (
    CardProfile,
    HostProfile,
    LinkProfile,
    Measured,
    RigProfile,
    card_of,
)
from fttrain.rig.transports import TRANSPORTS, measure_transport, transports
from fttrain.util.units import GIB, gib

Say = Callable[[str], None]
BUSY = 0.3  # of the cores, in the last minute: above it other programs distort the rates
MUCH_BYTES = 2 * GIB  # of a card: more than a display uses
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MeasuredShapes:
    """The sizes of the model's work on a rig."""

    name: str
    layers: int
    tokens: int  # of a micro-batch
    micro_batches: int  # of a rank's step
    frozen_format: FrozenFormat  # of a layer
    gradient_bytes: int  # of a layer's adapters, fp32
    boundary_bytes: int  # of a micro-batch between two stages

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer in the frozen base."""
        return self.frozen_format.layout.size_bytes

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of each GEMM with frozen weights."""
        return [group.shape for group in self.frozen_format.groups.values()]

    @property
    def gemm_flop(self) -> int:
        """FLOP of a layer's frozen weights for a micro-batch, forward."""
        return sum(2 * self.tokens * out * width for out, width in self.shapes)

    @property
    def true_bytes(self) -> dict[str, int]:
        """Bytes of each collective as a strategy uses it."""
        return {
            "all_reduce": self.gradient_bytes,
            "reduce_scatter": self.gradient_bytes,
            "all_gather": self.layer_bytes,
            "broadcast": self.layer_bytes,
            "send_recv": self.boundary_bytes,
        }


@dataclass(frozen=True)
class DiskPaths:
    """The files for the read rate of the disk."""

    files: Sequence[Path]  # of the frozen cache
    folder: Path  # for a temporary file, where ``files`` is empty


def measure(
    work: MeasuredShapes,
    disk: DiskPaths,
    group: RankGroup,
    device: torch.device,
    backend: str,
    budget_s: float,
    link_command: Sequence[str],
) -> RigProfile:
    """The profile of the ranks of ``group``, the same on each of them. Every rank calls it.

    Args:
        group: joins the ranks over gloo on the CPU, independent of the measured links.
        device: this rank's. backend: as rig.backend.
        budget_s: for each transport.
        link_command: starts a process that calls ``link_rank.main`` with the job added to it.
    """
    say: Say = print_progress if group.is_main else lambda text: None
    load, cores = os.getloadavg()[0], machine.host().cores
    if load > BUSY * cores:
        say(f"other programs are at work (load {load:.1f} on {cores} cores): rates will be too low")
    say(f"computing as {work.name} does")
    mine = _card(work, group, device)
    say("memory, copies and disk")
    to_card, to_host = copy_rates(group, device)
    host = _host(disk, group)
    links, overhead_bytes = _links(work, group, device, backend, budget_s, link_command, say)
    mine = dataclasses.replace(
        mine, to_card=to_card, to_host=to_host, overhead_bytes=overhead_bytes
    )
    cards = tuple(card_of(json.loads(text)) for text in _each(group, json.dumps(asdict(mine))))
    for rank, card in enumerate(cards):
        if (card.others_bytes or 0) > MUCH_BYTES:
            say(
                f"other programs hold {gib(card.others_bytes or 0)} of the card of rank {rank}: "
                "plans leave it to them; without them measure anew"
            )
    return RigProfile(
        name=f"{group.world_size}x {mine.name}",
        cards=cards,
        host=host,
        links=links,
        measured=Measured(
            datetime.now(UTC).isoformat(timespec="seconds"), machine.identity(), machine.versions()
        ),
    )


def _card(work: MeasuredShapes, group: RankGroup, device: torch.device) -> CardProfile:
    """Rates of this rank's card while all ranks compute: CPUs share cores, cards share power."""
    dtype, frozen_format = work.frozen_format.dtype, work.frozen_format
    group.barrier()
    gemm = gemm_flop_per_s(work.shapes, work.tokens, dtype, device)
    facts = topology.facts(device)  # while the card is awake
    group.barrier()
    dequantise = dequantise_bytes_per_s(frozen_format, device)
    group.barrier()
    rate = memory_bytes_per_s(device)
    name, memory_bytes = machine.cpu_name(), psutil.virtual_memory().total
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes that measure links
        facts["others_bytes"] = others_bytes(device)
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes = properties.name, properties.total_memory
    memory_bytes //= ranks_a_device(device, local_world_size())
    return CardProfile(name, device.type, memory_bytes, gemm, dequantise, rate, **facts)


def _host(disk: DiskPaths, group: RankGroup) -> HostProfile:
    """Rates of the host: memory and update by all ranks at once, the disk by one of them."""
    group.barrier()
    copied = memory_bytes_per_s(_CPU)
    group.barrier()
    updated = adamw_values_per_s()
    all_copied, all_updated = map(sum, zip(*group.gather([copied, updated]), strict=True))
    read = disk_bytes_per_s(disk.files, disk.folder) if group.is_main else None
    group.barrier()
    return dataclasses.replace(
        machine.host(),
        memory_bytes_per_s=all_copied,
        adamw_values_per_s=all_updated,
        disk_bytes_per_s=json.loads(group.broadcast_str(json.dumps(read))),
    )


def _links(
    work: MeasuredShapes,
    group: RankGroup,
    device: torch.device,
    backend: str,
    budget_s: float,
    link_command: Sequence[str],
    say: Say,
) -> tuple[tuple[LinkProfile, ...], int | None]:
    """(links of all transports, bytes that the first one's process took of this rank's card)."""
    if group.world_size == 1:
        say("one rank: there is no link to measure")
        # The process alone still measures the memory before the first tensor.
        link, overhead_bytes = measure_transport(
            TRANSPORTS[-1], group, device, 0, {}, 0, 0.0, link_command
        )
        if link.wrong:
            say(f"what a run's process takes could not be measured: {link.wrong}")
        return (), overhead_bytes
    links, overheads = [], []
    for transport in transports(device, backend):
        link, overhead_bytes = measure_transport(
            transport,
            group,
            device,
            work.layers,
            work.true_bytes,
            MOST_BYTES[device.type],
            budget_s,
            link_command,
        )
        links.append(link)
        overheads.append(overhead_bytes)
        if link.wrong:
            say(f"link, {link.transport}: {link.wrong}")
    return tuple(links), overheads[0]


def _each(group: RankGroup, text: str) -> list[str]:
    """``text`` of every rank, by rank."""
    return [group.broadcast_str(text, rank) for rank in range(group.world_size)]


def print_progress(text: str) -> None:
    """Print a line of progress, apart from the results on stdout."""
    print(text, file=sys.stderr, flush=True)
