"""The way from a checkpoint to the frozen base: one layer at a time, quantised into its flat
buffer.

Host memory while loading: the layer as it is stored (pages of its file, which the system may
reclaim), one of its tensors in the compute dtype, the layer in 4 bits, and about 64 MiB.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

from fttrain.frozen.readers import Reader
from fttrain.model.decoder import Architecture
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.quant.scheme import NESTED_BLOCKSIZE, QuantisedWeight, dynamic_code, quantise
from fttrain.util.errors import UserError

ENDS = {  # frozen tensor outside the layers -> its name in the checkpoint
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}


def load_end(reader: Reader, architecture: Architecture, end: str) -> Tensor:
    """The ``embedding`` (V, C), ``final_norm`` (C,) or ``head`` (V, C), as it is stored."""
    name, shape = ENDS[end], (architecture.config.vocab_size, architecture.hidden)
    return _checked(reader.tensor(name), name, shape[1:] if end == "final_norm" else shape)


def check_head(reader: Reader, architecture: Architecture, checkpoint: str) -> None:
    """Raise UserError for a checkpoint without the head that its configuration announces."""
    if not architecture.tied and not reader.has(ENDS["head"]):
        raise UserError(
            f"{checkpoint}: tensor {ENDS['head']} is missing, and config.json says that it is not "
            "the embedding (tie_word_embeddings=false); take a whole checkpoint"
        )


def load_layer(
    reader: Reader,
    architecture: Architecture,
    frozen_format: FrozenFormat,
    layer: int,
    device: torch.device,
) -> Tensor:
    """Read, quantise and lay out one layer: uint8 (layout.size_bytes,) on ``device``."""
    flat = torch.zeros(frozen_format.layout.size_bytes, dtype=torch.uint8, device=device)
    views = frozen_format.layout.views(flat)
    prefix = f"model.layers.{layer}."
    for group in architecture.groups:
        shape = group.shape
        for member, (path, rows) in enumerate(zip(group.paths, shape.rows, strict=True)):
            name, expected = f"{prefix}{path}.weight", (rows.stop - rows.start, shape.in_features)
            if frozen_format.quant.is_quantised:
                weight = _quantised(reader, name, expected, frozen_format, device)
                frozen_format.write_quantised(views, shape.name, member, weight)
            else:
                views[f"{shape.name}.weight"][rows] = _checked(
                    reader.tensor(name), name, expected
                ).to(device)
            if shape.bias:
                bias = f"{prefix}{path}.bias"
                views[f"{shape.name}.bias"][rows] = _checked(
                    reader.tensor(bias), bias, expected[:1]
                ).to(device)
    for name, view in views.items():
        if name.endswith("norm.weight"):
            view.copy_(_checked(reader.tensor(prefix + name), prefix + name, tuple(view.shape)))
    return flat


def check_quantisation(stored: dict[str, Any] | None, quant: QuantConfig) -> None:
    """Raise UserError for settings that differ from those of an already quantised checkpoint.

    ``stored`` is the checkpoint's ``quantization_config``.
    """
    if stored is None:
        return
    if stored.get("quant_method") != "bitsandbytes" or not stored.get("load_in_4bit"):
        raise UserError(
            f"model: the checkpoint is quantised with {stored.get('quant_method')!r}; only 4-bit "
            "bitsandbytes ones are read"
        )
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    double_quant = bool(stored.get("bnb_4bit_use_double_quant", False))
    if (quant.kind, quant.double_quant) != (kind, double_quant):
        raise UserError(
            f"quant: the checkpoint is already quantised; quant={kind} "
            f"quant.double_quant={str(double_quant).lower()} "
            "reads it as it is"
        )


def _quantised(
    reader: Reader,
    name: str,
    shape: tuple[int, int],
    frozen_format: FrozenFormat,
    device: torch.device,
) -> QuantisedWeight:
    quant = frozen_format.quant
    if reader.has(f"{name}.absmax"):
        return _prequantised(reader, name, shape, quant, device)
    weight = _checked(reader.tensor(name), name, shape).to(device=device, dtype=frozen_format.dtype)
    return quantise(weight, quant, name)


def _prequantised(
    reader: Reader, name: str, shape: tuple[int, int], quant: QuantConfig, device: torch.device
) -> QuantisedWeight:
    """The bytes, as they are, of a weight that bitsandbytes has quantised before."""
    state = _quant_state(reader, f"{name}.quant_state.bitsandbytes__{quant.kind}", quant)
    if state["shape"] != shape:
        raise UserError(f"{name}: shape {state['shape']} in the checkpoint, {shape} expected")
    if state["blocksize"] != quant.blocksize:
        raise UserError(
            f"{name}: quantised with quant.blocksize={state['blocksize']}, not {quant.blocksize}"
        )
    if shape[1] % quant.blocksize:  # bitsandbytes' CPU kernel dequantises such shapes wrongly
        raise UserError(
            f"{name}: quantised in blocks of {quant.blocksize} that do not divide its rows of "
            f"{shape[1]}; take the checkpoint that is not quantised"
        )
    weights, scales = math.prod(shape), math.prod(shape) // quant.blocksize
    # The codes are the same bytes under any dtype (bitsandbytes' quant_storage).
    packed = reader.tensor(name).reshape(-1).view(torch.uint8)
    packed = _checked(packed, name, (weights // 2,)).to(device)
    if not quant.double_quant:
        absmax = _stored(reader, f"{name}.absmax", scales, torch.float32)
        return QuantisedWeight(packed, absmax.to(device), None, None)
    absmax = _stored(reader, f"{name}.absmax", scales, torch.uint8)
    nested_scales = -(-scales // NESTED_BLOCKSIZE)
    nested = _stored(reader, f"{name}.nested_absmax", nested_scales, torch.float32)
    code = _stored(reader, f"{name}.nested_quant_map", 256, torch.float32)
    is_dynamic = torch.equal(code, dynamic_code(code.device))
    if not is_dynamic or state["nested_blocksize"] != NESTED_BLOCKSIZE:
        raise UserError(
            f"{name}: its scales are quantised with a code or block size other than bitsandbytes' "
            "own"
        )
    offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
    return QuantisedWeight(packed, absmax.to(device), nested.to(device), offset)


def _quant_state(reader: Reader, name: str, quant: QuantConfig) -> dict[str, Any]:
    """The settings that bitsandbytes stores with a weight: JSON, as the bytes of a tensor."""
    try:
        stored = json.loads(bytes(reader.tensor(name).tolist()))
        state = {"shape": tuple(stored["shape"]), "blocksize": stored["blocksize"]}
        if quant.double_quant:
            state["nested_blocksize"] = stored["nested_blocksize"]
            state["nested_offset"] = float(stored["nested_offset"])
        return state
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{name}: not what bitsandbytes writes ({error!r})") from error


def _stored(reader: Reader, name: str, length: int, dtype: torch.dtype) -> Tensor:
    tensor = reader.tensor(name)
    if tensor.dtype != dtype:
        raise UserError(f"{name}: {tensor.dtype} in the checkpoint, {dtype} expected")
    return _checked(tensor, name, (length,))


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name}: shape {tuple(tensor.shape)} in the checkpoint, {shape} expected")
    return tensor
