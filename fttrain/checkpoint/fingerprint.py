"""What a checkpoint is, said without reading its weights: two that differ are never taken for one
another.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any

from fttrain.checkpoint.source import Source

GGUF_HEAD_BYTES = 1 << 20  # the start of a GGUF file: its metadata


def fingerprint(source: Source) -> dict[str, Any]:
    """A hub id is its commit. A file is its name, size, time of change and header; a folder is
    what is true of its config.json and safetensors files.
    """
    if source.hub_id is not None:
        return {"hub": source.hub_id, "commit": source.commit}
    if source.gguf_file is not None:
        return {"gguf": _state(source.folder / source.gguf_file, GGUF_HEAD_BYTES)}
    files = [source.folder / "config.json", *source.folder.glob("*.safetensors*")]
    return {"files": [_state(file, _header_bytes(file)) for file in sorted(files)]}


def _header_bytes(file: Path) -> int:
    """Of a safetensors file: 8 bytes with the length of its header, and the header. Other files:
    all.
    """
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        return size
    with open(file, "rb") as stream:
        start = stream.read(8)
    return min(size, 8 + struct.unpack("<Q", start)[0]) if len(start) == 8 else size


def _state(file: Path, head_bytes: int) -> dict[str, Any]:
    state = file.stat()
    with open(file, "rb") as stream:
        head = hashlib.sha256(stream.read(head_bytes)).hexdigest()
    return {
        "name": file.name,
        "size_bytes": state.st_size,
        "changed_ns": state.st_mtime_ns,
        "header_sha256": head,
    }
