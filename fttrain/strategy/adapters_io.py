"""Adapters of a decoder by name, out of and into its flat masters; and whole out of the parts that
ranks hold.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup
from fttrain.model.decoder import Decoder
from fttrain.util.errors import UserError


def adapter_state(decoder: Decoder, group: RankGroup) -> dict[str, Tensor]:
    """fp32 masters of the whole model, on rank 0; others may get less. Every rank calls it.

    ``model.layers.0.self_attn.q_proj.lora_A`` (r, in), ``...lora_B`` (out, r), and with DoRA
    ``...lora_magnitude_vector`` (out,).
    """
    own = {str(layer.index): layer.adapters.flat.detach() for layer in decoder.layers}
    any_layer = decoder.layers[0].adapters  # all are laid out alike
    every = own if has_all(decoder) else assemble(own, holders(decoder, group))
    return {
        name: master
        for layer, flat in every.items()
        for name, master in any_layer.named(flat, int(layer))
    }


def has_all(decoder: Decoder) -> bool:
    """Whether this rank updates every value of the model's adapters."""
    is_whole = decoder.layers[0].adapters.layout.portion.world_size == 1
    return is_whole and len(decoder.layers) == decoder.architecture.layers


def holders(decoder: Decoder, group: RankGroup) -> RankGroup:
    """The ranks that hold each value of the adapters once: with optim.shard all ranks do, and the
    stages of a pipeline those of one machine.
    """
    whole_layers = decoder.layers[0].adapters.layout.portion.world_size == 1
    return group.intra_node if whole_layers else group


def load_adapter_state(decoder: Decoder, state: dict[str, Tensor]) -> None:
    """Copies what of ``state``, a whole adapter, this rank updates into its masters, and all that
    it computes with into the compute copies. Every rank calls it.

    Raises UserError where names or shapes differ.
    """
    state = part_of(state, decoder)
    check_fit(_shapes(decoder), state)
    for layer in decoder.layers:  # one at a time: whole masters may be more than a rank's own
        adapters = layer.adapters
        whole = torch.zeros(adapters.layout.values, device=adapters.flat.device)
        for name, view in adapters.named(whole):
            view.copy_(state[name])
        adapters.load(whole)


def _shapes(decoder: Decoder) -> dict[str, torch.Size]:
    return {
        name: view.shape
        for layer in decoder.layers
        for name, view in layer.adapters.named(
            torch.empty(layer.adapters.layout.values, device="meta")
        )
    }


def check_fit(shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """``shapes``: of what trains, by name. Raises UserError where ``state`` has other names or
    shapes.
    """
    differing = sorted(shapes.keys() ^ state.keys())
    if differing:
        raise UserError(
            f"{differing[0]} and {len(differing) - 1} more are only in one of the "
            "snapshot and the model; "
            "lora.target_modules, lora.use_dora or the model differ"
        )
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise UserError(
                f"{name} has shape {tuple(state[name].shape)} in the snapshot, "
                f"{tuple(shape)} in the model; lora.r or the model differ"
            )


def part_of(state: dict[str, Tensor], decoder: Decoder) -> dict[str, Tensor]:
    """What of a whole adapter belongs to the layers of ``decoder``, and what to none of the model:
    that is for ``load_adapter_state`` to refuse.
    """
    others = set(range(decoder.architecture.layers)) - {layer.index for layer in decoder.layers}
    prefixes = tuple(f"model.layers.{layer}." for layer in others)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def assemble(own: dict[str, Tensor], group: RankGroup) -> dict[str, Tensor]:
    """Tensors that the ranks hold different ones of, or of the same name different parts, which
    follow end to end -> all of them, in host memory, on rank 0 of ``group``.

    A number without dimensions is the same in every part. Other ranks keep nothing of what passes.
    Every rank calls it.
    """
    found: dict[str, list[Tensor]] = {}
    for source in range(group.world_size):
        for name, arrived in group.broadcast_tensors(own, source):
            if group.is_main:
                found.setdefault(name, []).append(arrived)
    return {name: _joined(found.pop(name)) for name in list(found)}


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 and parts[0].dim() else parts[0]
