"""Where a rank's memory goes: what was booked beside what was measured, and what frees most."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fttrain.rig.memory import peak_device_bytes
from fttrain.rig.probe import is_out_of_memory, peak_host_bytes
from fttrain.store.filling import LAYERS
from fttrain.store.hostpool import Booking, largest
from fttrain.strategy import ends, parts, trained
from fttrain.util.errors import UserError, first_line
from fttrain.util.units import GIB

KNOBS = {  # part on the device -> what makes it smaller
    LAYERS: "strategy=shard, stream or pipeline, or a smaller strategy.resident_layers",
    parts.SAVED: "activations=recompute with boundaries=host, or a smaller schedule.group",
    parts.MOVING: "a smaller data.seq_len or loop.micro_batch_size",
    ends.EMBEDDING: "embedding=host",
    ends.HEAD: "head=nf4 or head=streamed",
    ends.BROUGHT: "head=nf4",
    trained.ADAPTERS: "optim.offload=true, optim=adamw8bit or a smaller lora.r",
    parts.WEIGHTS: "quant.dequant=tile",
    parts.SLOTS: "strategy.slots=2",
}
WORKSPACE = "kernels and what they pass on"


@dataclass(frozen=True)
class Use:
    """One part of a rank's memory."""

    part: str
    device_bytes: int = 0
    host_bytes: int = 0  # shared parts once, whoever fills them


def uses(bookings: Sequence[Booking], device: torch.device) -> list[Use]:
    """All parts so far, the largest first, and last what no part accounts for.

    On the device: the most that torch's allocator gave out beside the parts, what it holds and gave
    nobody, and what the driver counts beside that (context, communication buffers, other
    programs). On the host: the interpreter, its libraries and, of a CPU, the kernels' workspace.
    """
    on_card = device.type == "cuda"
    known = [
        Use(b.what, b.size_bytes, 0)
        if on_card and b.place == "device"
        else Use(b.what, 0, b.size_bytes)
        for b in bookings
    ]
    known.sort(key=lambda use: -(use.device_bytes + use.host_bytes))
    rest_bytes = peak_host_bytes() - sum(use.host_bytes for use in known)
    found = [*known]
    if on_card:
        given, held = peak_device_bytes(device), torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        booked = sum(use.device_bytes for use in known)
        found += [
            Use(WORKSPACE, max(0, given - booked)),
            Use("held by the allocator", max(0, held - given)),
            Use("context, communication, other programs", max(0, total - free - held)),
        ]
    name = "interpreter and libraries" if on_card else f"interpreter, libraries, {WORKSPACE}"
    return [*found, Use(name, 0, max(0, rest_bytes))]


def table(found: Sequence[Use], title: str) -> list[str]:
    """Lines of text: parts in GiB on the card and on the host."""
    total = Use("together", sum(u.device_bytes for u in found), sum(u.host_bytes for u in found))
    shown = [use for use in found if max(use.device_bytes, use.host_bytes) >= GIB // 200]
    width = max(len(use.part) for use in [*shown, total])
    on_card = total.device_bytes > 0
    lines = [f"{title}, GiB", f"  {'':{width}}{'  device' if on_card else ''}    host"]
    for use in [*shown, total]:
        device = f"{use.device_bytes / GIB:8.2f}" if on_card else ""
        lines.append(f"  {use.part:{width}}{device}{use.host_bytes / GIB:8.2f}")
    return lines


@contextmanager
def explained(bookings: Sequence[Booking], rank: int, device: torch.device) -> Iterator[None]:
    """UserError, with the largest parts and what frees most, where memory runs out inside."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if is_out_of_memory(error):
            told = ran_out(bookings, rank, device, first_line(error))
            raise UserError("; ".join(told)) from error
        raise


def ran_out(
    bookings: Sequence[Booking], rank: int, device: torch.device, said: str
) -> tuple[str, str]:
    """What happened, with the largest parts; and what frees most. ``said``: by the allocator."""
    on_device = [booking for booking in bookings if booking.place == "device"]
    ordered = sorted(on_device, key=lambda booking: -booking.size_bytes)
    helps = [KNOBS[booking.what] for booking in ordered if booking.what in KNOBS][:2]
    asked = re.search(r"[Tt]ried to allocate [\d.]+ \w+", said)
    return (
        f"rank {rank} ran out of memory on {device} "
        f"({asked[0] if asked else said}); the largest parts: "
        f"{largest(on_device) or 'unknown'}",
        f"what frees most: {'; '.join(helps)}; or a smaller data.seq_len or loop.micro_batch_size",
    )
