"""Tensors in durable safetensors files."""

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fttrain.util.atomic_files import sync


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes that the data of ``tensors`` takes on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and sync one safetensors file; the tensors may be views of one flat buffer."""
    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(on_host, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library makes it readable by its owner only
    sync(path)
