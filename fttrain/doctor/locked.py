"""Check of page-locked memory, with the buffers that a run uses."""

import torch

from fttrain.doctor.finding import Finding, ok, warning
from fttrain.memory.pinned import HostBuffer
from fttrain.rig.timing import median_s
from fttrain.util.units import GIB, gib

LOCKED_BYTES = 1 * GIB  # a run locks some GiB up to most of the host's memory


def locked_memory(device: torch.device) -> Finding:
    """Page-lock memory as a run does, and measure its copy rate to ``device``. `ulimit -l` does not
    matter: NVIDIA's driver locks pages itself, without that limit.
    """
    if device.type != "cuda":
        return ok("a CPU run page-locks nothing")
    memory = HostBuffer(-1, LOCKED_BYTES)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    problems: list[str] = []
    memory.page_lock(buffer, "a buffer", speak=False, warn=problems.append)
    if problems:
        return warning(
            problems[0],
            "Linux itself instead of WSL2, a container that lets the driver lock pages; "
            "strategy=shard or pipeline, embedding=device and layer_inputs=device need little of "
            "it",
        )
    on_card = torch.empty(LOCKED_BYTES, dtype=torch.uint8, device=device)
    seconds = median_s(lambda: on_card.copy_(buffer, non_blocking=True), device)
    rate = f"{LOCKED_BYTES / seconds / 1e9:.1f} GB/s"
    return ok(f"{gib(LOCKED_BYTES)} page-locked, copied to the card at {rate}")
