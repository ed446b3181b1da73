"""All weights of a model, trained: in snapshots, and as a model that transformers loads."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fttrain.frozen.readers import INDEX, SINGLE, read_index
from fttrain.frozen.source import Source
from fttrain.util import atomic_files
from fttrain.util.errors import UserError
from fttrain.util.tensor_files import write_tensors

WEIGHTS = "weights.safetensors"  # of a snapshot: fp32 masters under transformers' names
SHARD_BYTES = 5 * 10**9  # as transformers divides a model
GENERATION = "generation_config.json"  # the tokens that end an answer, among others


def check(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError, with ``where`` and its name, for a tensor that is empty or not finite."""
    if not weights:
        raise UserError(f"{where}: there are no weights")
    for name, tensor in weights.items():
        if not tensor.numel():
            raise UserError(f"{where}: {name} is empty, of shape {tuple(tensor.shape)}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds values that are not finite")


def save_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write fp32 masters into the folder of a snapshot. Raises UserError as ``check`` does."""
    check(weights, str(folder))
    write_tensors(folder / WEIGHTS, weights)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a snapshot, or of a model that ``save_model`` has written: fp32, on the host.

    Raises UserError for a file that cannot be read.
    """
    shards = [WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(set(read_index(folder).values()))
    weights: dict[str, Tensor] = {}
    for file in shards or [SINGLE]:
        try:
            weights |= load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file}: cannot be read ({error})") from error
    return {name: tensor.to(torch.float32) for name, tensor in weights.items()}


def save_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Any,
    tokenizer: Any,
    source: Source,
    dtype: torch.dtype,
) -> None:
    """Write a model that ``AutoModelForCausalLM.from_pretrained(folder)`` loads. An earlier one is
    replaced.

    Args:
        weights: transformers' names -> tensors, any device; saved as ``dtype``, in shards.
        config: transformers' configuration of the model.
        tokenizer: transformers' own; saved beside it.
        source: of the base; its generation_config.json is copied.

    Raises:
        UserError: an empty or non-finite tensor, by name; or a disk that is full. Nothing
            half-written stays.
    """
    check(weights, str(folder))
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed save
    size_bytes = sum(tensor.numel() * dtype.itemsize for tensor in weights.values())
    try:
        with atomic_files.room_for(folder, size_bytes, "saving the model"):
            atomic_files.make_folder(part)
            _write_shards(part, weights, dtype, size_bytes)
            _configuration(config, dtype).save_pretrained(part)
            tokenizer.save_pretrained(part)
            if (source.folder / GENERATION).is_file():
                shutil.copyfile(source.folder / GENERATION, part / GENERATION)
            for file in part.iterdir():
                atomic_files.sync(file)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            atomic_files.sync(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write_shards(
    folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, size_bytes: int
) -> None:
    shards = list(_shards(weights, dtype))
    if len(shards) == 1:
        write_tensors(folder / SINGLE, _as(weights, shards[0], dtype))
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, _as(weights, names, dtype))  # one at a time in memory
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    atomic_files.write_bytes(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _shards(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[list[str]]:
    """The names of each file's tensors: as many as fit, at least one."""
    names: list[str] = []
    filled_bytes = 0
    for name, tensor in weights.items():
        size_bytes = tensor.numel() * dtype.itemsize
        if names and filled_bytes + size_bytes > SHARD_BYTES:
            yield names
            names, filled_bytes = [], 0
        names.append(name)
        filled_bytes += size_bytes
    yield names


def _as(weights: Mapping[str, Tensor], names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weights[name].to(dtype) for name in names}


def _configuration(config: Any, dtype: torch.dtype) -> Any:
    """A copy of ``config`` for a model in ``dtype`` that is not quantised."""
    result = type(config).from_dict(config.to_dict())
    result.dtype = dtype
    if not getattr(result, "architectures", None):  # a GGUF file does not name it
        result.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[result.model_type]]
    if hasattr(result, "quantization_config"):
        del result.quantization_config
    return result
