"""grouped(G): G micro-batches pass a layer together.

G = 1 runs all layers for one micro-batch, then for the next. G = all micro-batches of the step runs
one layer for all of them: its bytes are brought and dequantised once a pass, and its adapter
gradient is complete as its backward ends.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.errors import UserError
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.schedule import layer_pass
from fttrain.schedule.layer_pass import Work
from fttrain.store import Store


@dataclass(frozen=True)
class ScheduleConfig:
    """In which order layers and micro-batches run."""

    # micro-batches that pass a layer together: 1 | N | "all" (those of the step)
    group: str | int = "all"

    def __post_init__(self) -> None:
        if self.group != "all" and (isinstance(self.group, str) or self.group < 1):
            raise UserError(f"schedule.group={self.group}: all, or a whole number of 1 or more")

    def size(self, micro_batches: int) -> int:
        """G for a step of so many micro-batches on this rank."""
        return micro_batches if isinstance(self.group, str) else min(self.group, micro_batches)


def forward_backward(
    decoder: Decoder,
    store: Store,
    micro_batches: list[MicroBatch],
    group_size: int,
    activations: str,
    dropout: Callable[[MicroBatch], DropoutKey | None],
    gradient_complete: Callable[[int], None],
) -> Tensor:
    """One optimizer step's forward and backward.

    Adapter gradients, of the loss SUM over all targets, are added to each layer's flat gradient;
    ``gradient_complete(layer)`` is called as soon as a layer's last backward has been issued.
    Returns the loss sum, fp64.
    """
    total = torch.zeros((), dtype=torch.float64, device=decoder.embedding.weight.device)
    groups = [micro_batches[i : i + group_size] for i in range(0, len(micro_batches), group_size)]
    for number, group in enumerate(groups):
        works = [
            layer_pass.start(decoder, batch, dropout(batch)) for batch in group if batch.lengths
        ]
        _forward(decoder, store, works, activations)
        for work in works:
            loss, work.hidden = decoder.head.loss_and_gradient(
                work.hidden, work.micro_batch.targets
            )
            total += loss
        last = number == len(groups) - 1
        _backward(decoder, store, works, gradient_complete if last else lambda layer: None)
    return total


def evaluate(
    decoder: Decoder, store: Store, micro_batches: list[MicroBatch], group_size: int
) -> Tensor:
    """Loss sum over all targets, fp64, without gradients."""
    total = torch.zeros((), dtype=torch.float64, device=decoder.embedding.weight.device)
    for i in range(0, len(micro_batches), group_size):
        works = [
            layer_pass.start(decoder, batch, None)
            for batch in micro_batches[i : i + group_size]
            if batch.lengths
        ]
        for layer in layer_pass.walk(decoder, store, range(len(store))):
            for work in works:
                layer_pass.forward_only(decoder.layers[layer], work)
        for work in works:
            total += decoder.head.loss(work.hidden, work.micro_batch.targets)
    return total


def _forward(decoder: Decoder, store: Store, works: list[Work], activations: str) -> None:
    for layer in layer_pass.walk(decoder, store, range(len(store))):
        for work in works:
            layer_pass.forward(decoder.layers[layer], work, activations)


def _backward(
    decoder: Decoder, store: Store, works: list[Work], gradient_complete: Callable[[int], None]
) -> None:
    for layer in layer_pass.walk(decoder, store, range(len(store) - 1, -1, -1)):
        for work in works:
            layer_pass.backward(decoder.layers[layer], work)
        gradient_complete(layer)
