"""A pipeline stage's part in one pass of micro-batches: receive, run the stage's layers, send."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.model.decoder import Decoder
from fttrain.schedule import layer_pass
from fttrain.schedule.activations import Policies
from fttrain.schedule.layer_pass import Gradients
from fttrain.schedule.pipeline_p2p import NEXT, PREV, PipelineP2P, RecvQueue
from fttrain.schedule.step_runner import Dropout, StepRunner
from fttrain.store import Store

OLDEST, NEWEST = slice(0, 1), slice(-1, None)  # of the micro-batches in flight


class StagePass:
    """Forward and backward of a stage. ``micro_batches``: all of the pass, none empty, the same on
    every stage.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: Store,
        p2p: PipelineP2P,
        policies: Policies,
        gradients: Gradients,
        micro_batches: Sequence[MicroBatch],
        dropout: Dropout,
    ) -> None:
        self._decoder, self._store, self._p2p = decoder, store, p2p
        self._gradients, self._micro_batches = gradients, micro_batches
        # The loss sum is zero but on the last stage.
        self.runner = StepRunner(decoder, policies, dropout)
        self._rows = [len(batch.padded().input_ids) for batch in micro_batches]  # N of each
        self._from_prev = None if p2p.is_first else p2p.recv_queue(self._rows, PREV)
        self._from_next = None if p2p.is_last else p2p.recv_queue(self._rows, NEXT)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def forward(self, number: int) -> None:
        """Run forward of micro-batch ``number`` through this stage's layers."""
        self.runner.start(self._micro_batches[number], self._receive(self._from_prev))
        for layer in self._iterate_layers(range(len(self._store))):
            self.runner.forward(layer, NEWEST)
        if self._p2p.is_last:
            self.runner.head(NEWEST)
        else:
            self._send(number, NEWEST, NEXT)

    def backward(self, number: int) -> None:
        """Run backward of micro-batch ``number`` through this stage's layers. Adds to the adapters'
        gradients.

        Backwards run in the order of the forwards: ``number`` is the oldest one in flight.
        """
        self._take_gradient()
        for layer in self._iterate_layers(range(len(self._store) - 1, -1, -1)):
            self._gradients.begin_layer(layer)
            self.runner.backward(layer, OLDEST)
            self._gradients.end_layer(layer, last=number == len(self) - 1)
        if not self._p2p.is_first:
            self._send(number, OLDEST, PREV)
        del self.runner.in_flight[OLDEST]

    def end_all_layers(self) -> None:
        """Declare all gradients complete where there are no micro-batches: ranks of other nodes
        with the same layers wait for the reduction.
        """
        for layer in range(len(self._store) - 1, -1, -1):
            self._gradients.begin_layer(layer)
            self._gradients.end_layer(layer, last=True)

    def evaluate(self, number: int) -> None:
        """Run forward of micro-batch ``number`` without saving anything for backward."""
        self.runner.start(self._micro_batches[number], self._receive(self._from_prev))
        for layer in self._iterate_layers(range(len(self._store))):
            self.runner.forward_only(layer)
        if self._p2p.is_last:
            self.runner.head_only()
        else:
            self._send(number, NEWEST, NEXT)
        self.runner.in_flight.clear()

    def _take_gradient(self) -> None:
        """Receive the gradient of the stage's output; on the last stage the head has left it."""
        gradient = self._receive(self._from_next)  # (N, C)
        if gradient is not None:
            for batch in self.runner.in_flight[OLDEST]:
                batch.hidden = gradient

    def _receive(self, queue: RecvQueue | None) -> Tensor | None:
        """The next tensor (N, C) of a neighbour. The neighbour waits until it is received, so where
        memory runs out the step is dropped and the receive repeated.
        """
        if queue is None:
            return None
        received: list[Tensor] = []
        with self.runner.computing():
            received.append(queue.next())
        return received[0] if received else queue.next()

    def _send(self, number: int, selection: slice, neighbour: int) -> None:
        """Send ``hidden`` (N, C) of ``selection``, micro-batch ``number``. A rank that ran out of
        memory has none in flight and sends zeros, for which its neighbour waits.
        """
        hidden = [batch.hidden for batch in self.runner.in_flight[selection]]
        self._p2p.send(hidden[0] if hidden else self._p2p.zeros(self._rows[number]), neighbour)

    def _iterate_layers(self, order: range) -> Iterator[int]:
        return layer_pass.iterate_layers(self._decoder, self._store, order)
