"""Adapters of a decoder by name, out of and into its flat masters."""

from torch import Tensor

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
