"""One layer, one micro-batch, forward or backward: what every schedule is made of.

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
    """Where adapter gradients are while a layer's backward adds to them."""

    def open(self, layer: int) -> None:
        """Have what this step has added so far where backward of ``layer`` can add to it."""
        ...

    def close(self, layer: int, last: bool) -> None:
        """Backward of some micro-batches is issued; ``last``: nothing more comes in this step."""
        ...


@dataclass
class InFlightMicroBatch:
    """A micro-batch on its way through the layers."""

    micro_batch: MicroBatch
    rotary: tuple[Tensor, Tensor]  # cos and sin (N, D)
    dropout: DropoutKey | None
    hidden: Tensor  # (N, C): what the next layer reads; in backward its gradient
    # Of each layer passed its policy, and what that starts backward from
    saved: list[tuple[Policy, Any]] = field(default_factory=list)

    def drop(self) -> None:
        """Let go of all that it keeps, whoever still holds the work itself."""
        self.saved.clear()
        self.hidden = self.hidden.new_empty(0)


def start(
    decoder: Decoder, micro_batch: MicroBatch, dropout: DropoutKey | None, hidden: Tensor | None
) -> InFlightMicroBatch:
    """A micro-batch, rows rounded up to what kernels like, before the first of ``decoder``'s
    layers.

    ``micro_batch`` in host memory; ``hidden`` (N, C): from the stage before, None: embed.
    """
    micro_batch = micro_batch.padded()
    if hidden is None:
        hidden = decoder.embed(micro_batch.input_ids)
    micro_batch = micro_batch.to(decoder.device)
    return InFlightMicroBatch(
        micro_batch, decoder.rotary(micro_batch.position_ids), dropout, hidden
    )


def iterate_layers(decoder: Decoder, store: Store, order: range) -> Iterator[int]:
    """The layers in ``order``, each bound to its bytes while the caller uses it, the next ones
    already on their way.
    """
    for place, layer in enumerate(order):
        store.prefetch(order[place:])
        decoder.layers[layer].adapters.ready()
        decoder.layers[layer].state.frozen = store.get(layer)
        yield layer
        decoder.layers[layer].state.frozen = None
        store.release(layer)


def forward_only(layer: Layer, work: InFlightMicroBatch) -> None:
    """Pass the layer without keeping anything for backward."""
    _enter(layer, work)
    with torch.no_grad():
        work.hidden = layer(work.hidden, work.rotary)


def forward(layer: Layer, work: InFlightMicroBatch, policy: Policy) -> None:
    """Pass the layer and save what ``policy`` says."""
    _enter(layer, work)
    work.hidden, saved = policy.forward(layer, work.hidden, work.rotary)
    work.saved.append((policy, saved))


def backward(layer: Layer, work: InFlightMicroBatch, upcoming: InFlightMicroBatch) -> None:
    """``work.hidden``: gradient of the layer's output -> gradient of its input. Adds to the layer's
    adapter gradient.

    ``upcoming``: the micro-batch whose backward follows; what it starts from is brought meanwhile.
    """
    _enter(layer, work)
    policy, saved = work.saved.pop()
    policy.prefetch(saved)
    if upcoming.saved:
        next_policy, next_saved = upcoming.saved[-1]
        next_policy.prefetch(next_saved)
    work.hidden = policy.backward(layer, saved, work.hidden, work.rotary)


def _enter(layer: Layer, work: InFlightMicroBatch) -> None:
    layer.state.lengths = work.micro_batch.lengths
    layer.state.dropout = work.dropout
