"""The specification of a frozen base: its checkpoint, its quantisation, and so its folder."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fttrain.frozen.cache import FORM
from fttrain.frozen.fingerprint import fingerprint
from fttrain.frozen.source import Source
from fttrain.model.decoder import Architecture
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.util.cache_dir import cache_root


@dataclass(frozen=True)
class FrozenSpec:
    """The checkpoint and the format of a frozen base."""

    source: Source
    architecture: Architecture
    frozen_format: FrozenFormat

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the bytes of its cache depend on, as JSON values.

        Raises UserError for a file of the checkpoint that cannot be read.
        """
        quant = self.frozen_format.quant
        identity = {
            "source": fingerprint(self.source),
            "quant": [quant.kind, quant.blocksize, quant.double_quant],
            "dtype": str(self.frozen_format.dtype),
            "layout": {k: asdict(slot) for k, slot in self.frozen_format.layout.slots.items()},
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
        return plain

    def folder(self, cache_dir: str | None) -> Path:
        """The folder of its cache, named by its identity."""
        key = hashlib.sha256(json.dumps({**FORM, **self.identity}).encode()).hexdigest()[:16]
        name = self.source.gguf_file or self.source.name.rpartition("/")[2]
        readable = re.sub(r"[^\w.-]+", "-", name.lower().removesuffix(".gguf"))[:60]
        kind = self.frozen_format.quant.kind
        return cache_root(cache_dir) / "frozen" / f"{readable}-{kind}-{key}"


def cache_bytes(shape: Architecture, frozen_format: FrozenFormat) -> int:
    """The bytes of a frozen cache: layers and tables, without the final norm (some KB)."""
    tables = 1 if shape.tied else 2  # embedding and head
    table_bytes = int(shape.config.vocab_size) * shape.hidden * frozen_format.dtype.itemsize
    return shape.layers * frozen_format.layout.size_bytes + tables * table_bytes
