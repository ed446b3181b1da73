"""A pipeline stage's part in one pass of micro-batches: receive, its own layers, send."""

from collections.abc import Callable, Iterator, Sequence

import torch

from fttrain.data.batch import MicroBatch
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.schedule import layer_pass
from fttrain.schedule.activations import Policies
from fttrain.schedule.layer_pass import Gradients, Work
from fttrain.schedule.stage_link import DOWN, UP, StageLink
from fttrain.store import Store


class StagePass:
    """``micro_batches``: those of the pass, none empty, the same on every stage."""

    def __init__(
        self,
        decoder: Decoder,
        store: Store,
        link: StageLink,
        policies: Policies,
        gradients: Gradients,
        micro_batches: Sequence[MicroBatch],
        dropout: Callable[[MicroBatch], DropoutKey | None],
    ) -> None:
        self._decoder, self._store, self._link = decoder, store, link
        self._policies, self._gradients = policies, gradients
        self._micro_batches, self._dropout = micro_batches, dropout
        # Loss sum of the last stage, fp64; zero elsewhere
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=decoder.device)
        rows = [len(batch.padded().input_ids) for batch in micro_batches]
        self._from_before = None if link.is_first else link.inbox(rows, DOWN)
        self._from_after = None if link.is_last else link.inbox(rows, UP)
        self._works: dict[int, Work] = {}  # between forward and backward

    def __len__(self) -> int:
        return len(self._micro_batches)

    def forward(self, number: int) -> None:
        """Pass this stage's layers; keep what backward needs."""
        work = self._works[number] = self._enter(number)
        for layer in self._walk(range(len(self._store))):
            layer_pass.forward(self._decoder.layers[layer], work, self._policies[layer])
        if not self._link.is_last:
            self._link.send(work.hidden, UP)
            return
        head, batch = self._decoder.head, work.micro_batch
        with head.brought():
            loss, work.hidden = head.loss_and_gradient(work.hidden, batch.targets, batch.trained)
        self.loss_sum += loss

    def backward(self, number: int) -> None:
        """Pass back through the layers; adapter gradients are added where they live."""
        work = self._works.pop(number)
        if self._from_after is not None:
            work.hidden = self._from_after.next()
        last = number == len(self) - 1
        for layer in self._walk(range(len(self._store) - 1, -1, -1)):
            self._gradients.open(layer)
            layer_pass.backward(self._decoder.layers[layer], work, work)
            self._gradients.close(layer, last)
        if not self._link.is_first:
            self._link.send(work.hidden, DOWN)

    def evaluate(self, number: int) -> None:
        """Forward without keeping anything."""
        work = self._enter(number)
        for layer in self._walk(range(len(self._store))):
            layer_pass.forward_only(self._decoder.layers[layer], work)
        if not self._link.is_last:
            self._link.send(work.hidden, UP)
            return
        head, batch = self._decoder.head, work.micro_batch
        with head.brought():
            self.loss_sum += head.loss(work.hidden, batch.targets, batch.trained)

    def _enter(self, number: int) -> Work:
        batch = self._micro_batches[number]
        hidden = None if self._from_before is None else self._from_before.next()
        return layer_pass.start(self._decoder, batch, self._dropout(batch), hidden)

    def _walk(self, order: range) -> Iterator[int]:
        return layer_pass.walk(self._decoder, self._store, order)
