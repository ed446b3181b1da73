"""grouped(G): G micro-batches pass a layer together.

G = 1 runs all layers for one micro-batch, then for the next. G = all micro-batches of the step runs
one layer for all of them: its bytes are brought and dequantised once a pass, and its adapter
gradient is complete as its backward ends.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.schedule import layer_pass
from fttrain.schedule.activations import Policies
from fttrain.schedule.layer_pass import Gradients, Work
from fttrain.store import Store


def forward_backward(
    decoder: Decoder,
    store: Store,
    micro_batches: list[MicroBatch],
    group_size: int,
    policies: Policies,
    dropout: Callable[[MicroBatch], DropoutKey | None],
    gradients: Gradients,
) -> Tensor:
    """One optimizer step's forward and backward.

    Adapter gradients, of the loss SUM over all targets, are added to what ``gradients`` opens. A
    layer is opened once a group, and closed for good as soon as its last backward has been issued.
    Returns the loss sum, fp64.
    """
    total = torch.zeros((), dtype=torch.float64, device=decoder.device)
    groups = [micro_batches[i : i + group_size] for i in range(0, len(micro_batches), group_size)]
    for number, group in enumerate(groups):
        works = _start(decoder, group, dropout)
        for layer in layer_pass.walk(decoder, store, range(len(store))):
            for work in works:
                layer_pass.forward(decoder.layers[layer], work, policies[layer])
        with decoder.head.brought():
            for work in works:
                batch = work.micro_batch
                loss, work.hidden = decoder.head.loss_and_gradient(
                    work.hidden, batch.targets, batch.trained
                )
                total += loss
        _backward(decoder, store, works, gradients, number == len(groups) - 1)
    return total


def _backward(
    decoder: Decoder,
    store: Store,
    works: list[Work],
    gradients: Gradients,
    last: bool,
) -> None:
    """All layers in reverse; ``last``: of the step's groups."""
    for layer in layer_pass.walk(decoder, store, range(len(store) - 1, -1, -1)):
        gradients.open(layer)
        for number, work in enumerate(works):
            upcoming = works[(number + 1) % len(works)]
            layer_pass.backward(decoder.layers[layer], work, upcoming)
        gradients.close(layer, last)


def evaluate(
    decoder: Decoder, store: Store, micro_batches: list[MicroBatch], group_size: int
) -> Tensor:
    """Loss sum over all targets, fp64, without gradients."""
    total = torch.zeros((), dtype=torch.float64, device=decoder.device)
    for i in range(0, len(micro_batches), group_size):
        works = _start(decoder, micro_batches[i : i + group_size], lambda batch: None)
        for layer in layer_pass.walk(decoder, store, range(len(store))):
            for work in works:
                layer_pass.forward_only(decoder.layers[layer], work)
        with decoder.head.brought():
            for work in works:
                batch = work.micro_batch
                total += decoder.head.loss(work.hidden, batch.targets, batch.trained)
    return total


def _start(
    decoder: Decoder,
    group: list[MicroBatch],
    dropout: Callable[[MicroBatch], DropoutKey | None],
) -> list[Work]:
    """The micro-batches of a group that have tokens, embedded."""
    return [
        layer_pass.start(decoder, batch, dropout(batch), None) for batch in group if batch.lengths
    ]
