"""One rank's part in a step or an evaluation, which memory may not suffice for.

A rank that runs out cannot just stop: the others wait for its part of every layer, its gradients,
or what it sends. It drops all it has under way and walks on with nothing to compute, like a rank
whose micro-batches are empty; at the end of the step all ranks learn that the step is void.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.memory.device import is_out_of_memory
from fttrain.model.decoder import Decoder
from fttrain.model.linears import DropoutKey
from fttrain.schedule import layer_pass
from fttrain.schedule.activations import Policies
from fttrain.schedule.layer_pass import InFlightMicroBatch
from fttrain.util.errors import first_line

Dropout = Callable[[MicroBatch], DropoutKey | None]


class StepRunner:
    """What a step, or an evaluation, has under way on this rank, and what came of it so far."""

    def __init__(self, decoder: Decoder, policies: Policies, dropout: Dropout) -> None:
        self._decoder, self._policies, self._dropout = decoder, policies, dropout
        self.works: list[
            InFlightMicroBatch
        ] = []  # between forward and backward; for good none once it ran out
        # Loss sum over the targets so far, fp64
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=decoder.device)
        self.ran_out = ""  # what was said as memory ran out; empty: it did not

    def start(self, micro_batch: MicroBatch, hidden: Tensor | None = None) -> None:
        """One more micro-batch is under way, unless memory has run out; ``hidden`` as
        ``layer_pass.start``.
        """
        with self.computing():
            if not self.ran_out:
                dropout = self._dropout(micro_batch)
                started = layer_pass.start(self._decoder, micro_batch, dropout, hidden)
                self.works.append(started)

    def forward(self, layer: int, works: slice = slice(None)) -> None:
        """Pass ``works`` of those under way through the bound ``layer``, and keep what its policy
        says.
        """
        with self.computing():
            for work in self.works[works]:
                layer_pass.forward(self._decoder.layers[layer], work, self._policies[layer])

    def forward_only(self, layer: int, works: slice = slice(None)) -> None:
        """As ``forward``, without keeping anything for backward."""
        with self.computing():
            for work in self.works[works]:
                layer_pass.forward_only(self._decoder.layers[layer], work)

    def head(self, works: slice = slice(None)) -> None:
        """Add the loss of ``works``; from here on they hold the gradient."""
        if not self.works[works]:
            return  # a streamed head need not come
        head = self._decoder.head
        with self.computing(), head.brought():
            for work in self.works[works]:
                batch = work.micro_batch
                loss, work.hidden = head.loss_and_gradient(
                    work.hidden, batch.targets, batch.trained
                )
                self.loss_sum += loss

    def head_only(self, works: slice = slice(None)) -> None:
        """Add the loss of ``works``, which has no gradient."""
        if not self.works[works]:
            return
        head = self._decoder.head
        with self.computing(), head.brought():
            for work in self.works[works]:
                batch = work.micro_batch
                self.loss_sum += head.loss(work.hidden, batch.targets, batch.trained)

    def backward(self, layer: int, works: slice = slice(None)) -> None:
        """Pass ``works`` back through the bound ``layer``, whose gradient is open."""
        with self.computing():
            passing = self.works[works]
            for number, work in enumerate(passing):
                upcoming = passing[(number + 1) % len(passing)]
                layer_pass.backward(self._decoder.layers[layer], work, upcoming)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around what this rank computes alone, never around what others take part in: where memory
        runs out inside, the rest of the block is left out and all that is under way is dropped.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.ran_out = self.ran_out or first_line(error)
            # What the calls that failed still hold would live as long as the error.
            traceback.clear_frames(error.__traceback__)
            self._drop()

    def _drop(self) -> None:
        for work in self.works:
            work.drop()
        self.works.clear()
        for policy in dict.fromkeys(self._policies):
            policy.discard()
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()  # other libraries, and pieces of another size, need it, too
