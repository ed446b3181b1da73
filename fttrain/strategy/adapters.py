"""Adapters of a decoder by name, out of and into its flat masters; and whole out of the parts that
ranks hold.
"""

import json

import torch
from torch import Tensor

from fttrain.dist import Group
from fttrain.errors import UserError
from fttrain.model.decoder import Decoder


def adapter_state(decoder: Decoder) -> dict[str, Tensor]:
    """Views of the fp32 masters.

    ``model.layers.0.self_attn.q_proj.lora_A`` (r, in), ``...lora_B`` (out, r).
    """
    return {name: master.detach() for name, master in decoder.named_masters()}


def load_adapter_state(decoder: Decoder, state: dict[str, Tensor]) -> None:
    """Copies ``state`` into the masters and the compute copies.

    Raises UserError where names or shapes differ.
    """
    masters = adapter_state(decoder)
    differing = sorted(masters.keys() ^ state.keys())
    if differing:
        raise UserError(
            f"adapter: {differing[0]} and {len(differing) - 1} more are only in one of the "
            "snapshot and the model; "
            "lora.target_modules or the model differ"
        )
    for name, master in masters.items():
        if state[name].shape != master.shape:
            raise UserError(
                f"adapter: {name} has shape {tuple(state[name].shape)} in the snapshot, "
                f"{tuple(master.shape)} in the model; lora.r or the model differ"
            )
        master.copy_(state[name])
    for layer in decoder.layers:
        layer.adapters.refresh()


def part_of(state: dict[str, Tensor], decoder: Decoder) -> dict[str, Tensor]:
    """What of a whole adapter belongs to the layers of ``decoder``, and what to none of the model:
    that is for ``load_adapter_state`` to refuse.
    """
    others = set(range(decoder.architecture.layers)) - {layer.index for layer in decoder.layers}
    prefixes = tuple(f"model.layers.{layer}." for layer in others)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def assemble(own: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Tensors that the ranks hold different ones of -> all of them, in host memory, on rank 0.

    Other ranks keep nothing of what passes. Every rank calls it.
    """
    whole = {} if not group.is_main else {name: tensor.cpu() for name, tensor in own.items()}
    for source in range(1, group.world_size):
        described = [
            (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in own.items()
        ]
        for name, shape, dtype in json.loads(group.share(json.dumps(described), source)):
            mine = group.rank == source
            tensor = own[name] if mine else torch.empty(shape, dtype=getattr(torch, dtype))
            arrived = group.broadcast(tensor.contiguous(), source)
            if group.is_main:
                whole[name] = arrived
    return whole
