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
from fttrain.store import Store
from fttrain.store.boundary import Boundaries, DeviceBoundaries


class Gradients(Protocol):
    """Where adapter gradients are while a layer's backward adds to them."""

    def open(self, layer: int) -> None:
        """Have what this step has added so far where backward of ``layer`` can add to it."""
        ...

    def close(self, layer: int, last: bool) -> None:
        """Backward of some micro-batches is issued; ``last``: nothing more comes in this step."""
        ...


@dataclass(frozen=True)
class Saving:
    """What a layer's pass leaves for its backward, and where."""

    activations: str = "recompute"  # the layer's input only | keep: all that backward reads
    boundaries: Boundaries = field(default_factory=DeviceBoundaries)


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

    boundary: Any  # the layer's input (N, C), as the boundaries keep it
    # (N, C) with its graph where activations are kept; None: recompute from the boundary
    output: Tensor | None


def start(
    decoder: Decoder, micro_batch: MicroBatch, dropout: DropoutKey | None, hidden: Tensor | None
) -> Work:
    """A micro-batch, rows rounded up to what kernels like, before the first of ``decoder``'s
    layers.

    ``micro_batch`` in host memory; ``hidden`` (N, C): from the stage before, None: embed.
    """
    micro_batch = micro_batch.padded()
    if hidden is None:
        hidden = decoder.embed(micro_batch.input_ids)
    micro_batch = micro_batch.to(decoder.device)
    return Work(micro_batch, decoder.rotary(micro_batch.position_ids), dropout, hidden)


def walk(decoder: Decoder, store: Store, order: range) -> Iterator[int]:
    """The layers in ``order``, each bound to its bytes while the caller uses it, the next ones
    already on their way.
    """
    for place, layer in enumerate(order):
        store.prefetch(order[place:])
        decoder.layers[layer].state.frozen = store.get(layer)
        yield layer
        decoder.layers[layer].state.frozen = None
        store.release(layer)


def forward_only(layer: Layer, work: Work) -> None:
    """Pass the layer without keeping anything for backward."""
    _enter(layer, work)
    with torch.no_grad():
        work.hidden = layer(work.hidden, work.rotary)


def forward(layer: Layer, work: Work, saving: Saving) -> None:
    """Pass the layer and save what ``saving`` says."""
    _enter(layer, work)
    boundary = work.hidden
    output = None
    if saving.activations == "keep":
        output = _with_graph(layer, boundary, work)
        work.hidden = output.detach()
    else:
        with torch.no_grad():
            work.hidden = layer(boundary, work.rotary)
    work.saved.append(Saved(saving.boundaries.save(boundary), output))


def backward(layer: Layer, work: Work, saving: Saving, upcoming: Work) -> None:
    """``work.hidden``: gradient of the layer's output -> gradient of its input. Adds to the layer's
    adapter gradient.

    ``upcoming``: the micro-batch whose backward follows; its boundary is brought meanwhile.
    """
    _enter(layer, work)
    saved = work.saved.pop()
    boundary, output = saving.boundaries.load(saved.boundary), saved.output
    if upcoming.saved:
        saving.boundaries.prefetch(upcoming.saved[-1].boundary)
    if output is None:
        layer.state.recomputing = True
        output = _with_graph(layer, boundary, work)
        layer.state.recomputing = False
    output.backward(work.hidden)
    gradient = boundary.grad
    assert gradient is not None
    work.hidden = gradient


def _enter(layer: Layer, work: Work) -> None:
    layer.state.lengths = work.micro_batch.lengths
    layer.state.dropout = work.dropout


def _with_graph(layer: Layer, boundary: Tensor, work: Work) -> Tensor:
    with torch.enable_grad():
        return layer(boundary.requires_grad_(), work.rotary)
