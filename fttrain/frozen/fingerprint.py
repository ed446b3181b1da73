"""The fingerprint of a checkpoint, taken without reading its weights: two checkpoints that differ
have different ones.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any, BinaryIO

from fttrain.frozen.source import Source
from fttrain.util.errors import UserError

GGUF_HEAD_BYTES = 1 << 20  # the start of a GGUF file: its metadata
MAX_HEADER_BYTES = 100_000_000  # safetensors refuses a longer one


def fingerprint(source: Source) -> dict[str, Any]:
    """The values that identify a checkpoint: of a hub id its commit; of a file its name, size, time
    of change and header; of a folder those of config.json, the safetensors files and their index.

    Raises UserError for a file that cannot be read.
    """
    if source.hub_id is not None:
        return {"hub": source.hub_id, "commit": source.commit}
    if source.gguf_file is not None:
        return {"gguf": _state(source.folder / source.gguf_file)}
    names = ("config.json", "*.safetensors", "*.safetensors.index.json")
    files = [file for name in names for file in source.folder.glob(name)]
    return {"files": [_state(file) for file in sorted(files)]}


def _state(file: Path) -> dict[str, Any]:
    try:
        state = file.stat()
        with open(file, "rb") as stream:
            head = hashlib.sha256(_head(stream, file.suffix)).hexdigest()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); if the model does without it, remove it"
        ) from error
    return {
        "name": file.name,
        "size_bytes": state.st_size,
        "changed_ns": state.st_mtime_ns,
        "header_sha256": head,
    }


def _head(stream: BinaryIO, suffix: str) -> bytes:
    """The start of a GGUF file; the first 8 bytes (the header's length) and the header of a
    safetensors file; all bytes of other files.
    """
    if suffix == ".gguf":
        return stream.read(GGUF_HEAD_BYTES)
    if suffix != ".safetensors":
        return stream.read()
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    return start + stream.read(min(length, MAX_HEADER_BYTES))
