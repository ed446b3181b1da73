"""Memory of the device: the bytes free for a rank, and the errors of running out."""

import torch

from fttrain.memory.host import available_host_bytes

# Messages of errors that are no torch.OutOfMemoryError: torch's CPU allocator; cuBLAS, which makes
# a handle at its first use on a thread and names either reason; the driver, for calls and for
# mapping segments; NCCL, which allocates buffers at the first use of a connection
_RAN_OUT = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch's allocator, of the device or of the CPU, or the driver and its libraries ran
    out of memory.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _RAN_OUT)


def free_device_bytes(device: torch.device, local_world_size: int) -> int:
    """Bytes that this rank can still allocate on ``device``: its share, where ranks share it."""
    if device.type != "cuda":
        return available_host_bytes() // local_world_size
    free, total = torch.cuda.mem_get_info(device)
    capped = torch.cuda.get_per_process_memory_fraction(device) * total
    share = free / ranks_a_device(device, local_world_size)
    return int(min(share, capped - torch.cuda.memory_reserved(device)))


def ranks_a_device(device: torch.device, local_world_size: int) -> int:
    """Ranks that share ``device``: a CPU is shared by all ranks of the machine, a GPU only with
    ``backend=gloo``.
    """
    if device.type != "cuda":
        return local_world_size
    return -(-local_world_size // torch.cuda.device_count())
