"""The frozen base on disk as a run reads it: quantised, one file a layer, sealed by a manifest.

    frozen/smollm2-135m-nf4-3f0c.../  manifest.json         written last: without it nothing counts
                                      layer_000.bin ...     a layer's flat buffer, byte for byte
                                      embedding.bin  final_norm.bin  head.bin (unless tied)

The manifest holds the identity of the base (source, quantisation, dtype, layout: everything that
the bytes depend on), and each file's size, SHA-256 and checksum. Opening compares identity and
sizes; the checksums are compared where the bytes are used, the SHA-256 by ``fttrain quantize``.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fttrain.quant.checksum import checksum
from fttrain.util.errors import UserError
from fttrain.util.manifest import MANIFEST, read_sealed

FORM = {"format": "fttrain-frozen-base", "version": 2}
HELP = "free some space, or set frozen.cache_dir to a folder with room that you may write to"
READ_BYTES = 1 << 30  # of one read: Linux allows 2 GiB


@dataclass(frozen=True)
class FileRecord:
    """The size and the digests of a file of the cache."""

    size_bytes: int
    sha256: str
    checksum: int  # as quant.checksum

    @staticmethod
    def read(entry: Mapping[str, Any]) -> "FileRecord":
        return FileRecord(entry["size_bytes"], entry["sha256"], entry["checksum"])


def layer_name(layer: int) -> str:
    """The name of a layer's file."""
    return f"layer_{layer:03d}"


def file_of(folder: Path, name: str) -> Path:
    """The file with the bytes of ``name``."""
    return folder / f"{name}.bin"


def read_records(folder: Path, identity: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The records in the manifest of ``folder``, by name. ``identity``: of the base that the cache
    should be of.

    Raises ValueError where the manifest is missing or damaged (the text says which), UserError
    where the cache is of another base.
    """
    body = read_sealed(folder / MANIFEST, FORM)
    others = [key for key, value in identity.items() if body.get(key) != value]
    if others:
        raise UserError(
            f"{folder / MANIFEST}: of another frozen base than the one that this run wants (other "
            f"{', '.join(others)}); move that folder away, and it is made anew"
        )
    return {name: FileRecord.read(entry) for name, entry in body["files"].items()}


def has_size(folder: Path, name: str, record: FileRecord) -> bool:
    """Whether the file is there, as large as it was written."""
    try:
        return file_of(folder, name).stat().st_size == record.size_bytes
    except OSError:
        return False


class FrozenCache:
    """A complete cache: the ``FrozenBase`` of a run."""

    def __init__(self, folder: Path, records: dict[str, FileRecord]) -> None:
        self.folder = folder
        self._records = records
        self._layers = sum(name.startswith("layer_") for name in records)

    def __len__(self) -> int:
        return self._layers

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "head" not in self._records

    @property
    def size_bytes(self) -> int:
        """The bytes of all files."""
        return sum(record.size_bytes for record in self._records.values())

    @property
    def digest(self) -> str:
        """A digest of all bytes of the base."""
        digests = {name: record.sha256 for name, record in sorted(self._records.items())}
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]

    def checksum(self, layer: int) -> int:
        """The checksum of the whole layer, from the manifest."""
        return self._records[layer_name(layer)].checksum

    def path(self, layer: int) -> Path:
        """The layer's file."""
        return file_of(self.folder, layer_name(layer))

    def read(self, layer: int, into: Tensor, offset_bytes: int = 0) -> None:
        """Fill ``into`` uint8 (n,), host memory, with n bytes of the layer from ``offset_bytes``
        on.

        Raises UserError where the disk does not deliver them.
        """
        _read(self.path(layer), into, offset_bytes)

    def read_end(self, name: str, into: Tensor) -> None:
        """Fill ``into``, contiguous and in host memory, with the ``embedding`` (V, C), the
        ``final_norm`` (C,) or the ``head`` (V, C).

        Raises UserError where the disk does not deliver them as they were written.
        """
        if name == "head" and self.tied:
            name = "embedding"
        path, flat = file_of(self.folder, name), into.view(-1).view(torch.uint8)
        _read(path, flat, 0)
        if int(checksum(flat)) != self._records[name].checksum:
            raise UserError(
                f"{path}: its bytes are not those that were written (checksum); "
                "`fttrain quantize` makes it again"
            )


def _read(path: Path, into: Tensor, offset_bytes: int) -> None:
    view = into.numpy().view(np.uint8).data
    try:
        with open(path, "rb", buffering=0) as file:
            while view:
                read_bytes = os.preadv(file.fileno(), [view[:READ_BYTES]], offset_bytes)
                if not read_bytes:
                    raise UserError(f"{path}: it ends too early; `fttrain quantize` makes it again")
                view, offset_bytes = view[read_bytes:], offset_bytes + read_bytes
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
