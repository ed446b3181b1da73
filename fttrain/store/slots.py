"""A few device buffers of one layer each, filled ahead of use by a side stream.

    wanted:   l (in use)   l + 1        l + 2 ...
    slots:    [  l  ]      [ l + 1 ]            with two slots: one computes, one fills

A slot is filled again only after the event that its last use left behind; the host waits for
nothing. What still lies in a slot is not brought again: where forward turns into backward (and a
step into the next) the layers at the turn are there already.
"""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor

from fttrain.distributed.collectives import Handle
from fttrain.store.side_stream import Event, SideStream

Bring = Callable[[int, Tensor], Handle | None]  # (layer, slot uint8 (layer_bytes,))


class Slots:
    """``bring(layer, slot)`` fills a slot; it is called on the side stream, in the order of
    need.
    """

    def __init__(
        self, count: int, layer_bytes: int, device: torch.device, stream: SideStream, bring: Bring
    ) -> None:
        self._buffers = torch.empty(count, layer_bytes, dtype=torch.uint8, device=device)
        self._stream, self._bring = stream, bring
        self._layers: list[int | None] = [None] * count  # what lies in each slot, or comes into it
        self._tickets: list[Handle | None] = [None] * count
        self._released: list[Event] = [stream.record_event()] * count
        self._in_use: set[int] = set()  # layers between take and release

    def prefetch(self, layers: Iterable[int]) -> list[int]:
        """Start bringing the first of ``layers`` for which there are slots. What was started."""
        wanted = list(islice(layers, len(self._layers)))
        started = []
        for layer in wanted:
            if layer in self._layers:
                continue
            slot = self._free_slot(wanted)
            if slot is None:
                break
            self._fill(slot, layer)
            started.append(layer)
        return started

    def acquire(self, layer: int) -> Tensor:
        """uint8 (layer_bytes,), whole once the compute comes to it; in use until ``release``."""
        slot = self._layers.index(layer)
        ticket, self._tickets[slot] = self._tickets[slot], None
        if ticket is not None:
            ticket.wait()
        self._in_use.add(layer)
        return self._buffers[slot]

    def release(self, layer: int) -> None:
        """The slot may be filled again once the compute has done what it was asked so far."""
        self._in_use.remove(layer)
        self._released[self._layers.index(layer)] = self._stream.record_event()

    def _free_slot(self, wanted: list[int]) -> int | None:
        for slot, layer in enumerate(self._layers):
            if layer is None or (layer not in self._in_use and layer not in wanted):
                return slot
        return None

    def _fill(self, slot: int, layer: int) -> None:
        buffer = self._buffers[slot]
        self._layers[slot] = layer
        self._tickets[slot] = self._stream.run(
            lambda: self._bring(layer, buffer), self._released[slot]
        )
