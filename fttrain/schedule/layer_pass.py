"""Forward and backward of one layer for one micro-batch: the building blocks of every schedule.

Legend: N tokens, C hidden width, D width of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.model.decoder import Decoder, Layer
from fttrain.model.linears import DropoutKey
from fttrain.schedule.activations import Policy
from fttrain.store import Store


class Gradients(Protocol):
    """Buffers of the adapters' gradients, to which a layer's backward adds."""

    def begin_layer(self, layer: int) -> None:
        """Bind a buffer with this step's gradient so far, to which backward of ``layer`` adds."""
        ...

    def end_layer(self, layer: int, last: bool) -> None:
        """Take the gradient after backward of a group of micro-batches was issued. ``last``: the
        gradient of this step is complete.
        """
        ...


@dataclass
class InFlightMicroBatch:
    """A micro-batch on its way through the layers."""

    micro_batch: MicroBatch
    rotary: tuple[Tensor, Tensor]  # cos and sin (N, D)
    dropout: DropoutKey | None
    hidden: Tensor  # (N, C): the next layer's input; in backward its gradient
    # For each layer passed: its policy, and the state that the policy saved for backward
    saved: list[tuple[Policy, Any]] = field(default_factory=list)

    def drop(self) -> None:
        """Free all tensors, also where somebody still holds this object."""
        self.saved.clear()
        self.hidden = self.hidden.new_empty(0)


def start(
    decoder: Decoder, micro_batch: MicroBatch, dropout: DropoutKey | None, hidden: Tensor | None
) -> InFlightMicroBatch:
    """The micro-batch before the first of ``decoder``'s layers, its rows padded for the kernels.

    ``micro_batch``: in host memory; ``hidden`` (N, C): from the previous stage; None: embed.
    """
    micro_batch = micro_batch.padded()  # input_ids int64 (N,)
    if hidden is None:
        hidden = decoder.embed(micro_batch.input_ids)  # (N, C)
    micro_batch = micro_batch.to(decoder.device)
    return InFlightMicroBatch(
        micro_batch, decoder.rotary(micro_batch.position_ids), dropout, hidden
    )


def iterate_layers(decoder: Decoder, store: Store, order: range) -> Iterator[int]:
    """The layers in ``order``, each bound to its frozen bytes while the caller uses it and the next
    ones are prefetched.
    """
    for position, layer in enumerate(order):
        store.prefetch(order[position:])
        decoder.layers[layer].adapters.ready()
        decoder.layers[layer].state.frozen = store.get(layer)
        yield layer
        decoder.layers[layer].state.frozen = None
        store.release(layer)


def forward_only(layer: Layer, batch: InFlightMicroBatch) -> None:
    """Pass the layer and save nothing for backward."""
    _enter(layer, batch)
    with torch.no_grad():
        batch.hidden = layer(batch.hidden, batch.rotary)  # (N, C)


def forward(layer: Layer, batch: InFlightMicroBatch, policy: Policy) -> None:
    """Pass the layer by ``policy``, which saves what backward reads."""
    _enter(layer, batch)
    batch.hidden, saved = policy.forward(layer, batch.hidden, batch.rotary)  # (N, C)
    batch.saved.append((policy, saved))


def backward(layer: Layer, batch: InFlightMicroBatch, upcoming: InFlightMicroBatch) -> None:
    """``batch.hidden`` (N, C): the gradient of the layer's output -> that of its input. Adds to the
    layer's adapter gradient.

    ``upcoming``: the micro-batch whose backward follows; its saved state is prefetched.
    """
    _enter(layer, batch)
    policy, saved = batch.saved.pop()
    policy.prefetch(saved)
    if upcoming.saved:
        next_policy, next_saved = upcoming.saved[-1]
        next_policy.prefetch(next_saved)
    batch.hidden = policy.backward(layer, saved, batch.hidden, batch.rotary)  # (N, C)


def _enter(layer: Layer, batch: InFlightMicroBatch) -> None:
    """Bind the layer to the micro-batch's document lengths and dropout."""
    layer.state.lengths = batch.micro_batch.lengths
    layer.state.dropout = batch.dropout
