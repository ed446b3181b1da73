"""A rank's memory at this moment, by torch's allocator, the driver and the system."""

import psutil
import torch

from fttrain.memory.host import available_host_bytes, peak_host_bytes

# Device -> its highest peak before the last reset. Global, like the allocator's own figures: a
# reset must not hide the peak of the run from other readers.
_earlier_peaks_bytes: dict[torch.device, int] = {}


def peak_device_bytes(device: torch.device) -> int:
    """Peak bytes that torch's allocator gave out on ``device`` since the start, whatever samples
    were taken; 0 on the CPU.
    """
    if device.type != "cuda":
        return 0
    return max(_earlier_peaks_bytes.get(device, 0), torch.cuda.max_memory_allocated(device))


def sample(device: torch.device) -> dict[str, int]:
    """Memory of this process at this moment, by name, in bytes; with a CPU the host's alone.

    The call does not wait for the device: the figures are the allocator's and the driver's
    counters.

    device_allocated, device_reserved: given out, and held, by torch's allocator
    device_peak: peak bytes given out since the previous sample, or since the start
    device_used, device_total: bytes of the card used by all programs, by the driver; its size
    host_resident, host_peak: pages of this process now, and their peak; shared pages count in each
        rank
    host_free: bytes that programs can still allocate (see ``available_host_bytes``)
    """
    figures = _device(device) if device.type == "cuda" else {}
    resident_bytes = psutil.Process().memory_info().rss
    return figures | {
        "host_resident_bytes": resident_bytes,
        # The kernel's peak lags some pages behind its count of resident pages.
        "host_peak_bytes": max(resident_bytes, peak_host_bytes()),
        "host_free_bytes": available_host_bytes(),
    }


def _device(device: torch.device) -> dict[str, int]:
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    _earlier_peaks_bytes[device] = peak_device_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        # Before the first allocation the allocator has no statistics.
        "device_allocated_bytes": stats.get("allocated_bytes.all.current", 0),
        "device_reserved_bytes": stats.get("reserved_bytes.all.current", 0),
        "device_peak_bytes": stats.get("allocated_bytes.all.peak", 0),
        "device_used_bytes": total - free,
        "device_total_bytes": total,
    }
