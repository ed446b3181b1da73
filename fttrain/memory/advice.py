"""The error of a rank that ran out of memory: its largest parts, and settings that shrink them."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fttrain.memory.device import is_out_of_memory
from fttrain.memory.ledger import Reservation, largest_parts
from fttrain.memory.parts import Location
from fttrain.util.errors import UserError, first_line


@contextmanager
def explain_out_of_memory(
    reservations: Sequence[Reservation], rank: int, device: torch.device
) -> Iterator[None]:
    """Raise UserError, with the largest parts and the settings that shrink them, where memory runs
    out inside.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if is_out_of_memory(error):
            advice = out_of_memory_advice(reservations, rank, device, first_line(error))
            raise UserError("; ".join(advice)) from error
        raise


def out_of_memory_advice(
    reservations: Sequence[Reservation], rank: int, device: torch.device, message: str
) -> tuple[str, str]:
    """(error with the largest parts, settings that shrink them). ``message``: the allocator's."""
    on_device = [r for r in reservations if r.location is Location.DEVICE]
    ordered = sorted(on_device, key=lambda reservation: -reservation.size_bytes)
    settings = [r.part.shrink for r in ordered if r.part.shrink][:2]
    asked = re.search(r"[Tt]ried to allocate [\d.]+ \w+", message)
    return (
        f"rank {rank} ran out of memory on {device} "
        f"({asked[0] if asked else message}); the largest parts: "
        f"{largest_parts(on_device) or 'unknown'}",
        f"what frees most: {'; '.join(settings)}; or a smaller data.seq_len or "
        "loop.micro_batch_size",
    )
