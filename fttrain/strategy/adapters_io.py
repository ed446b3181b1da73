"""Adapters by name, out of and into a decoder's flat masters, gathered from the parts that ranks
hold.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup
from fttrain.model.decoder import Decoder
from fttrain.util.errors import UserError


def adapter_state(decoder: Decoder, group: RankGroup) -> dict[str, Tensor]:
    """The fp32 masters of the whole model, on rank 0; others may get less. A collective call.

    ``model.layers.0.self_attn.q_proj.lora_A`` (r, in), ``...lora_B`` (out, r), and with DoRA
    ``...lora_magnitude_vector`` (out,).
    """
    local_flats = {str(layer.index): layer.adapters.flat.detach() for layer in decoder.layers}
    any_layer = decoder.layers[0].adapters  # all are laid out alike
    flats = local_flats if has_all(decoder) else assemble(local_flats, holders(decoder, group))
    return {
        name: master
        for layer, flat in flats.items()
        for name, master in any_layer.named(flat, int(layer))
    }


def has_all(decoder: Decoder) -> bool:
    """Whether this rank updates all values of the model's adapters."""
    is_whole = decoder.layers[0].adapters.layout.shard.world_size == 1
    return is_whole and len(decoder.layers) == decoder.architecture.layers


def holders(decoder: Decoder, group: RankGroup) -> RankGroup:
    """The ranks that together hold each value of the adapters once: all ranks with optim.shard, the
    stages of one node with a pipeline.
    """
    whole_layers = decoder.layers[0].adapters.layout.shard.world_size == 1
    return group.intra_node if whole_layers else group


def load_adapter_state(decoder: Decoder, state: dict[str, Tensor]) -> None:
    """Load ``state``, a whole adapter: this rank's part into its masters, and all of its layers
    into the compute copies. A collective call.

    Raises UserError where names or shapes differ.
    """
    state = part_of(state, decoder)
    check_fit(_shapes(decoder), state)
    for layer in decoder.layers:  # one at a time: whole masters may be larger than this rank's part
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
    """Raise UserError where ``state`` has other names or shapes than ``shapes``, of the trained
    parameters by name.
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
    """The tensors of a whole adapter that belong to the layers of ``decoder`` or to no layer of the
    model: ``load_adapter_state`` refuses the latter.
    """
    others = set(range(decoder.architecture.layers)) - {layer.index for layer in decoder.layers}
    prefixes = tuple(f"model.layers.{layer}." for layer in others)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def assemble(local: dict[str, Tensor], group: RankGroup) -> dict[str, Tensor]:
    """All tensors of the ranks by name, in host memory, on rank 0 of ``group``; empty on others.
    Parts of one name are concatenated in the order of the ranks.

    ``local``: this rank's tensors. A tensor without dimensions must be the same on every rank. A
    collective call.
    """
    parts: dict[str, list[Tensor]] = {}
    for source in range(group.world_size):
        for name, tensor in group.broadcast_tensors(local, source):
            if group.is_main:
                parts.setdefault(name, []).append(tensor)
    # Parts are freed as they are joined.
    return {name: _joined(parts.pop(name)) for name in list(parts)}


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 and parts[0].dim() else parts[0]
