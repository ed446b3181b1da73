"""One rank's compute of a step or an evaluation, during which memory may run out.

A rank that runs out of memory cannot just stop: the others wait for its shard of every layer, its
gradients, or its sends. It drops all micro-batches in flight and goes on through the layers with
nothing to compute, like a rank whose micro-batches are empty. At the end of the step all ranks
learn that the step is void.

Legend: N tokens of a micro-batch, C hidden width.
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
from fttrain.objective.metrics import METRICS
from fttrain.schedule import layer_pass
from fttrain.schedule.activations import Policies
from fttrain.schedule.layer_pass import InFlightMicroBatch
from fttrain.util.errors import first_line

Dropout = Callable[[MicroBatch], DropoutKey | None]


class StepRunner:
    """The micro-batches in flight on this rank in a step or an evaluation, and its results so
    far.
    """

    def __init__(self, decoder: Decoder, policies: Policies, dropout: Dropout) -> None:
        self._decoder, self._policies, self._dropout = decoder, policies, dropout
        # Between forward and backward, oldest first; empty to the end once memory ran out
        self.in_flight: list[InFlightMicroBatch] = []
        # Sums over all targets so far: fp64 () of a step, fp64 (metrics,) of an evaluation
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=decoder.device)
        self.metric_sums = torch.zeros(len(METRICS), dtype=torch.float64, device=decoder.device)
        self.ran_out = ""  # message of the first out-of-memory error; empty: none

    def start(self, micro_batch: MicroBatch, hidden: Tensor | None = None) -> None:
        """Put ``micro_batch`` in flight, unless memory has run out. ``hidden`` (N, C): as in
        ``layer_pass.start``.
        """
        with self.computing():
            if not self.ran_out:
                dropout = self._dropout(micro_batch)
                started = layer_pass.start(self._decoder, micro_batch, dropout, hidden)
                self.in_flight.append(started)

    def forward(self, layer: int, selection: slice = slice(None)) -> None:
        """Pass ``selection`` of those in flight through the bound ``layer``. The layer's policy
        saves what backward reads.
        """
        with self.computing():
            for batch in self.in_flight[selection]:
                layer_pass.forward(self._decoder.layers[layer], batch, self._policies[layer])

    def forward_only(self, layer: int, selection: slice = slice(None)) -> None:
        """Pass ``selection`` through the bound ``layer`` and save nothing for backward."""
        with self.computing():
            for batch in self.in_flight[selection]:
                layer_pass.forward_only(self._decoder.layers[layer], batch)

    def head(self, selection: slice = slice(None)) -> None:
        """Add the loss of ``selection``. Their ``hidden`` (N, C) becomes its gradient."""
        if not self.in_flight[selection]:
            return  # a streamed head is not copied for nothing
        head = self._decoder.head
        with self.computing(), head.on_device():
            for batch in self.in_flight[selection]:
                micro_batch = batch.micro_batch
                loss, batch.hidden = head.loss_and_gradient(
                    batch.hidden,
                    micro_batch.targets,
                    micro_batch.trained,
                    micro_batch.target_counts,
                )
                self.loss_sum += loss

    def head_only(self, selection: slice = slice(None)) -> None:
        """Add the metrics of ``selection``, without a gradient."""
        if not self.in_flight[selection]:
            return
        head = self._decoder.head
        with self.computing(), head.on_device():
            for batch in self.in_flight[selection]:
                micro_batch = batch.micro_batch
                self.metric_sums += head.metric_sums(
                    batch.hidden, micro_batch.targets, micro_batch.trained
                )

    def backward(self, layer: int, selection: slice = slice(None)) -> None:
        """Pass ``selection`` back through the bound ``layer``, between ``begin_layer`` and
        ``end_layer`` of its gradient.
        """
        with self.computing():
            batches = self.in_flight[selection]
            for number, batch in enumerate(batches):
                upcoming = batches[(number + 1) % len(batches)]
                layer_pass.backward(self._decoder.layers[layer], batch, upcoming)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Guard compute of this rank alone, never a collective. Where memory runs out inside, the
        rest of the block is skipped and all micro-batches in flight are dropped.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.ran_out = self.ran_out or first_line(error)
            # Tensors in the frames of the failed calls would live as long as the error.
            traceback.clear_frames(error.__traceback__)
            self._drop()

    def _drop(self) -> None:
        for batch in self.in_flight:
            batch.drop()
        self.in_flight.clear()
        for policy in dict.fromkeys(self._policies):
            policy.discard()
        if self._decoder.device.type == "cuda":
            # Other libraries, and blocks of another size, need the memory, too.
            torch.cuda.empty_cache()
