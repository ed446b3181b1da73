"""The use of a rank's memory: reserved parts beside what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fttrain.memory.host import peak_host_bytes
from fttrain.memory.ledger import Reservation
from fttrain.memory.parts import Location, MemoryPart
from fttrain.memory.sampling import peak_device_bytes
from fttrain.util.units import GIB


@dataclass(frozen=True)
class PartUsage:
    """Bytes of one part of a rank's memory."""

    part: MemoryPart
    device_bytes: int = 0
    host_bytes: int = 0  # shared parts once, whoever fills them

    def to_json(self) -> dict[str, int | str]:
        """The entry of memory.json, with the part by its label."""
        return {
            "part": self.part.label,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
        }

    @staticmethod
    def from_json(values: dict[str, int | str]) -> "PartUsage":
        """The inverse of ``to_json``."""
        part = MemoryPart.of_label(str(values["part"]))
        return PartUsage(part, int(values["device_bytes"]), int(values["host_bytes"]))


def part_usage(reservations: Sequence[Reservation], device: torch.device) -> list[PartUsage]:
    """All reserved parts, the largest first, then the memory that no reservation accounts for.

    On the device: the peak of torch's allocator beyond the reservations, the bytes that it caches,
    and the rest of the driver's count (context, communication buffers, other programs). On the
    host: the interpreter, its libraries and, with a CPU, the kernels' workspace.
    """
    on_card = device.type == "cuda"
    reserved = [
        PartUsage(r.part, r.size_bytes, 0)
        if on_card and r.location is Location.DEVICE
        else PartUsage(r.part, 0, r.size_bytes)
        for r in reservations
    ]
    reserved.sort(key=lambda usage: -(usage.device_bytes + usage.host_bytes))
    rest_bytes = max(0, peak_host_bytes() - sum(usage.host_bytes for usage in reserved))
    if not on_card:
        return [*reserved, PartUsage(MemoryPart.HOST_REMAINDER, 0, rest_bytes)]
    allocated, held = peak_device_bytes(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    on_device = sum(usage.device_bytes for usage in reserved)
    return [
        *reserved,
        PartUsage(MemoryPart.WORKSPACE, max(0, allocated - on_device)),
        PartUsage(MemoryPart.ALLOCATOR_CACHE, max(0, held - allocated)),
        PartUsage(MemoryPart.CONTEXT, max(0, total - free - held)),
        PartUsage(MemoryPart.INTERPRETER, 0, rest_bytes),
    ]


def usage_table(usages: Sequence[PartUsage], title: str) -> list[str]:
    """Lines of text: parts in GiB on the card and on the host."""
    device_bytes = sum(usage.device_bytes for usage in usages)
    host_bytes = sum(usage.host_bytes for usage in usages)
    shown = [u for u in usages if max(u.device_bytes, u.host_bytes) >= GIB // 200]
    rows = [(u.part.label, u.device_bytes, u.host_bytes) for u in shown]
    rows.append(("together", device_bytes, host_bytes))
    width, on_card = max(len(label) for label, _, _ in rows), device_bytes > 0
    lines = [f"{title}, GiB", f"  {'':{width}}{'  device' if on_card else ''}    host"]
    for label, on_device, on_host in rows:
        device = f"{on_device / GIB:8.2f}" if on_card else ""
        lines.append(f"  {label:{width}}{device}{on_host / GIB:8.2f}")
    return lines
