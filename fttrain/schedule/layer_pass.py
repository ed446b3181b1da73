"""One layer, one micro-batch, forward or backward: what every schedule is made of.

Legend: N tokens, C hidden width, D width of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.errors import UserError
from fttrain.model.decoder import Decoder, Layer
from fttrain.model.linears import DropoutKey
from fttrain.store import Store

ACTIVATIONS = ("recompute", "keep")


def check_activations(policy: str) -> None:
    """Refuse an activation policy that does not exist."""
    if policy not in ACTIVATIONS:
        raise UserError(f"activations={policy!r}: one of {', '.join(ACTIVATIONS)} is allowed")


@dataclass
class Work:
    """A micro-batch on its way through the layers."""

    micro_batch: MicroBatch
    rotary: tuple[Tensor, Tensor]  # cos and sin (N, D)
    dropout: DropoutKey | None
    hidden: Tensor  # (N, C): what the next layer reads; in backward its gradient
    saved: list["Saved"] = field(default_factory=list)  # one for each layer passed


@dataclass
class Saved:
    """What a layer's backward starts from."""

    boundary: Tensor  # (N, C): the layer's input
    # (N, C) with its graph where activations are kept; None: recompute from the boundary
    output: Tensor | None


def start(decoder: Decoder, micro_batch: MicroBatch, dropout: DropoutKey | None) -> Work:
    """Embed a micro-batch, rows rounded up to what kernels like."""
    micro_batch = micro_batch.padded()
    return Work(
        micro_batch, decoder.rotary(micro_batch.position_ids), dropout, decoder.embed(micro_batch)
    )


def walk(decoder: Decoder, store: Store, order: range) -> Iterator[int]:
    """The layers in ``order``, each bound to its bytes while the caller uses it, the next one
    already on its way.
    """
    store.prefetch(order[0])
    for layer in order:
        store.prefetch(layer + order.step)
        decoder.layers[layer].state.frozen = store.get(layer)
        yield layer
        decoder.layers[layer].state.frozen = None
        store.release(layer)


def forward_only(layer: Layer, work: Work) -> None:
    """Pass the layer without keeping anything for backward."""
    _enter(layer, work)
    with torch.no_grad():
        work.hidden = layer(work.hidden, work.rotary)


def forward(layer: Layer, work: Work, activations: str) -> None:
    """Pass the layer and save what ``activations`` says."""
    _enter(layer, work)
    boundary = work.hidden
    if activations == "keep":
        output = _with_graph(layer, boundary, work)
        work.saved.append(Saved(boundary, output))
        work.hidden = output.detach()
        return
    with torch.no_grad():
        work.hidden = layer(boundary, work.rotary)
    work.saved.append(Saved(boundary, None))


def backward(layer: Layer, work: Work) -> None:
    """``work.hidden``: gradient of the layer's output -> gradient of its input. Adds to the layer's
    adapter gradient.
    """
    _enter(layer, work)
    saved = work.saved.pop()
    output = saved.output
    if output is None:
        layer.state.recomputing = True
        output = _with_graph(layer, saved.boundary, work)
        layer.state.recomputing = False
    output.backward(work.hidden)
    gradient = saved.boundary.grad
    assert gradient is not None
    work.hidden = gradient


def _enter(layer: Layer, work: Work) -> None:
    layer.state.lengths = work.micro_batch.lengths
    layer.state.dropout = work.dropout


def _with_graph(layer: Layer, boundary: Tensor, work: Work) -> Tensor:
    with torch.enable_grad():
        return layer(boundary.requires_grad_(), work.rotary)
