"""A rank's memory as it is now: what torch's allocator, the driver and the system say of it."""

import psutil
import torch

from fttrain.memory.host import available_host_bytes, peak_host_bytes

# Device -> its highest peak before the last reset. Of the process, as the allocator's own figures
# are: to start a peak anew must not take from others what they read as the peak of the run.
_earlier_peaks_bytes: dict[torch.device, int] = {}


def peak_device_bytes(device: torch.device) -> int:
    """The most that torch's allocator has given out on ``device``, whoever took samples on the way;
    0 on the CPU.
    """
    if device.type != "cuda":
        return 0
    return max(_earlier_peaks_bytes.get(device, 0), torch.cuda.max_memory_allocated(device))


def sample(device: torch.device) -> dict[str, int]:
    """This process's memory at this moment, by name, in bytes; of a CPU the host's alone.

    Nothing waits for work on the device: the figures are the allocator's books and the driver's.

    device_allocated, device_reserved: given out, and held, by torch's allocator
    device_peak: the most it gave out since the sample before, or since the start
    device_used, device_total: of the card by all programs, as the driver counts; what there is
    host_resident, host_peak: pages of this process now, and the most it has had; what ranks share
        counts for each
    host_free: what programs can still have (see ``available_host_bytes``)
    """
    figures = _device(device) if device.type == "cuda" else {}
    resident_bytes = psutil.Process().memory_info().rss
    return figures | {
        "host_resident_bytes": resident_bytes,
        # The kernel's peak lags some pages behind what it counts as resident.
        "host_peak_bytes": max(resident_bytes, peak_host_bytes()),
        "host_free_bytes": available_host_bytes(),
    }


def _device(device: torch.device) -> dict[str, int]:
    books = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    _earlier_peaks_bytes[device] = peak_device_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        # A process that has allocated nothing has no books yet.
        "device_allocated_bytes": books.get("allocated_bytes.all.current", 0),
        "device_reserved_bytes": books.get("reserved_bytes.all.current", 0),
        "device_peak_bytes": books.get("allocated_bytes.all.peak", 0),
        "device_used_bytes": total - free,
        "device_total_bytes": total,
    }
