"""Memory of the device: what is free for a rank, and how its end shows."""

import torch

from fttrain.memory.host import available_host_bytes

# What errors say that are no torch.OutOfMemoryError: torch's allocator of the CPU; cuBLAS, which
# makes a handle at its first use on a thread, and names either reason; the driver, of its calls and
# of mapping segments; NCCL, whose buffers come with the first use of a connection
_RAN_OUT = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch's allocator, on the device or of the CPU, could not give what was asked, or
    the driver and its libraries had no room for what they need beside it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _RAN_OUT)


def free_device_bytes(device: torch.device, local_world_size: int) -> int:
    """Memory that this rank can still have on ``device``: its share, where ranks share it."""
    if device.type != "cuda":
        return available_host_bytes() // local_world_size
    free, total = torch.cuda.mem_get_info(device)
    capped = torch.cuda.get_per_process_memory_fraction(device) * total
    share = free / ranks_a_device(device, local_world_size)
    return int(min(share, capped - torch.cuda.memory_reserved(device)))


def ranks_a_device(device: torch.device, local_world_size: int) -> int:
    """That share ``device``: all of the machine a CPU, of GPUs more than one with ``backend=gloo``
    alone.
    """
    if device.type != "cuda":
        return local_world_size
    return -(-local_world_size // torch.cuda.device_count())
