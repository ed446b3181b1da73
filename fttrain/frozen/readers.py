"""Readers of checkpoints, one tensor at a time by its transformers name: safetensors and GGUF."""

import json
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fttrain.frozen.source import Source
from fttrain.util.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Reader(Protocol):
    """The reader of one checkpoint."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of this transformers name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, on the host. Raises UserError where it is missing."""
        ...

    def rest(self) -> None:
        """Release the memory that reading has mapped. Reading may go on."""
        ...


def open_checkpoint(
    source: Source, config: Any, fetch: Callable[[str], Path] | None = None
) -> Reader:
    """The reader of ``source``.

    ``config``: transformers' configuration of the same checkpoint; ``fetch``: downloads a file that
    the folder lacks, by name. Raises UserError for a checkpoint that cannot be read.
    """
    if source.gguf_file:
        return GgufReader(source.folder / source.gguf_file, config)
    return SafetensorsReader(source.folder, fetch)


def read_index(folder: Path) -> dict[str, str]:
    """The index of shards: tensor -> name of its file; empty where there is none.

    Raises UserError for an index that cannot be read or leaves the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{index}: not an index of shards ({error!r})") from error
    for file in shards.values():
        if Path(file).name != file:
            raise UserError(f"{index}: {file} is not a file in this folder")
    return shards


class SafetensorsReader:
    """A folder with model.safetensors, or shards and their index.

    Files are memory-mapped: nothing is read twice. ``fetch`` downloads those that the folder lacks.
    """

    def __init__(self, folder: Path, fetch: Callable[[str], Path] | None = None) -> None:
        self._folder, self._fetch = folder, fetch
        self._handles: dict[str, Any] = {}
        self._files = self._read_index()  # tensor -> file

    def files(self, prefix: str) -> set[str]:
        """Names of the files with tensors whose name begins with ``prefix``."""
        return {file for name, file in self._files.items() if name.startswith(prefix)}

    def _read_index(self) -> dict[str, str]:
        shards = read_index(self._folder)
        for file in sorted(set(shards.values())):
            if self._fetch is None and not (self._folder / file).is_file():
                raise UserError(f"{self._folder / INDEX}: {file} is not a file in this folder")
        if shards:
            return shards
        if self._fetch is None and not (self._folder / SINGLE).is_file():
            raise UserError(
                f"model.path={self._folder}: neither {SINGLE} nor an index of shards is there"
            )
        return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)

    def _path(self, file: str) -> Path:
        path = self._folder / file
        return path if self._fetch is None or path.is_file() else self._fetch(file)

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            path = self._path(file)
            try:
                self._handles[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error})") from error
        return self._handles[file]

    def has(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise UserError(f"{self._folder}: tensor {name} is missing from the checkpoint")
        try:
            return self._handle(self._files[name]).get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                f"{self._folder / self._files[name]}: tensor {name} cannot be read ({error})"
            ) from error

    def rest(self) -> None:
        self._handles.clear()


class _TensorReader(gguf.GGUFReader):
    """The library's reader, without the vocabulary: its 100,000 strings take seconds to read."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        buffer: Any = self.data
        order = "<" if self.endianess == gguf.GGUFEndian.LITTLE else ">"
        item, count = struct.unpack_from(f"{order}IQ", buffer, orig_offs)
        offset = orig_offs + 12
        if item == gguf.GGUFValueType.STRING:
            length = struct.Struct(f"{order}Q")
            for _ in range(count):
                offset += 8 + length.unpack_from(buffer, offset)[0]
        elif item in self.gguf_scalar_to_np:
            offset += count * self.gguf_scalar_to_np[item]().itemsize
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return offset - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


class GgufReader:
    """The reader of a GGUF file of any quantisation; its tensors are dequantised, in fp32."""

    # Files of these architectures interleave the halves of each q and k head; transformers keeps
    # them apart.
    _INTERLEAVED = ("llama", "mistral")

    def __init__(self, file: Path, config: Any) -> None:
        self._file = file
        self._config = config
        try:
            reader = _TensorReader(file)
        except (ValueError, OSError, IndexError, struct.error) as error:
            raise UserError(f"{file}: not a whole GGUF file ({error})") from error
        self._mapped: Any = reader.data
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._refuse_unstated_rope_scaling()
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field else "llama"
        by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        if architecture not in by_name:
            raise UserError(f"{file}: unknown GGUF architecture {architecture!r}")
        self._name_map = gguf.get_tensor_name_map(by_name[architecture], config.num_hidden_layers)

    def _refuse_unstated_rope_scaling(self) -> None:
        """Raise UserError for a file that scales its rotary frequencies by a tensor that
        transformers leaves out, as Llama 3.1 does: the model would be slightly wrong at every
        position.
        """
        rope = getattr(self._config, "rope_parameters", None) or {}
        if "rope_freqs.weight" in self._tensors and rope.get("rope_type", "default") == "default":
            raise UserError(
                f"{self._file}: tensor rope_freqs.weight scales the rotary frequencies, which the "
                "configuration read from the file does not say; take the safetensors checkpoint"
            )

    def _gguf_name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        return f"{self._name_map.get_name(stem)}.{kind}"

    def has(self, name: str) -> bool:
        return self._gguf_name(name) in self._tensors

    def tensor(self, name: str) -> Tensor:
        stored = self._tensors.get(self._gguf_name(name))
        if stored is None:
            raise UserError(f"{self._file}: tensor {name} is missing from the checkpoint")
        try:
            dequantised = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self._file}: tensor {name} is stored as {stored.tensor_type.name}, which cannot "
                "be read; take a file of another type, or the safetensors checkpoint"
            ) from error
        values = torch.from_numpy(np.require(dequantised, requirements="W"))  # a copy if mapped
        if self._config.model_type in self._INTERLEAVED and "self_attn" in name:
            if "q_proj" in name:
                return _separate_halves(values, self._config.num_attention_heads)
            if "k_proj" in name:
                return _separate_halves(values, self._config.num_key_value_heads)
        return values

    def rest(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # clean pages of a file: they are read again when needed
            self._mapped._mmap.madvise(mmap.MADV_DONTNEED)


def _separate_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder (heads * D, ...): a head's rows from (D/2 pairs, 2) to (2 halves, D/2)."""
    pairs = weight.view(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
