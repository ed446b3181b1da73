"""A pipeline stage's part in one pass of micro-batches: receive, its own layers, send."""

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

OLDEST, NEWEST = slice(0, 1), slice(-1, None)  # of the micro-batches under way


class StagePass:
    """``micro_batches``: those of the pass, none empty, the same on every stage."""

    def __init__(
        self,
        decoder: Decoder,
        store: Store,
        link: PipelineP2P,
        policies: Policies,
        gradients: Gradients,
        micro_batches: Sequence[MicroBatch],
        dropout: Dropout,
    ) -> None:
        self._decoder, self._store, self._link = decoder, store, link
        self._gradients, self._micro_batches = gradients, micro_batches
        # Its loss sum is that of the last stage; zero elsewhere
        self.runner = StepRunner(decoder, policies, dropout)
        self._rows = [len(batch.padded().input_ids) for batch in micro_batches]
        self._from_before = None if link.is_first else link.inbox(self._rows, PREV)
        self._from_after = None if link.is_last else link.inbox(self._rows, NEXT)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def forward(self, number: int) -> None:
        """Pass this stage's layers; keep what backward needs."""
        self.runner.start(self._micro_batches[number], self._received(self._from_before))
        for layer in self._walk(range(len(self._store))):
            self.runner.forward(layer, NEWEST)
        if self._link.is_last:
            self.runner.head(NEWEST)
        else:
            self._send(number, NEWEST, NEXT)

    def backward(self, number: int) -> None:
        """Pass back through the layers; adapter gradients are added where they live.

        Micro-batches come back in the order in which they went: it is the oldest one's turn.
        """
        self._take_gradient()
        for layer in self._walk(range(len(self._store) - 1, -1, -1)):
            self._gradients.open(layer)
            self.runner.backward(layer, OLDEST)
            self._gradients.close(layer, last=number == len(self) - 1)
        if not self._link.is_first:
            self._send(number, OLDEST, PREV)
        del self.runner.works[OLDEST]

    def close_all(self) -> None:
        """In place of all backwards where there are no micro-batches: gradients are complete as
        they are, and whoever has the same layers waits for their sum.
        """
        for layer in range(len(self._store) - 1, -1, -1):
            self._gradients.open(layer)
            self._gradients.close(layer, last=True)

    def evaluate(self, number: int) -> None:
        """Forward without keeping anything."""
        self.runner.start(self._micro_batches[number], self._received(self._from_before))
        for layer in self._walk(range(len(self._store))):
            self.runner.forward_only(layer)
        if self._link.is_last:
            self.runner.head_only()
        else:
            self._send(number, NEWEST, NEXT)
        self.runner.works.clear()

    def _take_gradient(self) -> None:
        """The last stage's head has left it there."""
        gradient = self._received(self._from_after)
        if gradient is not None:
            for work in self.runner.works[OLDEST]:
                work.hidden = gradient

    def _received(self, inbox: RecvQueue | None) -> Tensor | None:
        """What the stage beside this one says next (N, C). Where there is no room for it, room is
        made: the sender waits until it is taken.
        """
        if inbox is None:
            return None
        received: list[Tensor] = []
        with self.runner.computing():
            received.append(inbox.next())
        return received[0] if received else inbox.next()

    def _send(self, number: int, works: slice, step: int) -> None:
        """What ``works``, one at most, hold after micro-batch ``number``; the stage beside this one
        waits for something of its shape in any case.
        """
        said = [work.hidden for work in self.runner.works[works]]
        self._link.send(said[0] if said else self._link.nothing(self._rows[number]), step)

    def _walk(self, order: range) -> Iterator[int]:
        return layer_pass.iterate_layers(self._decoder, self._store, order)
