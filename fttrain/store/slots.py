"""Slots (a double buffer): device buffers of one layer each, filled ahead of use by a side stream.

    upcoming: l (in use)   l + 1        l + 2 ...
    slots:    [  l  ]      [ l + 1 ]            with two slots: one computes, one fills

A slot is filled again only after the event that its last use recorded; the host never waits.
A layer that is still in a slot is not brought again: the last layers of forward are the first ones
of backward, and the last layers of backward the first ones of the next step.
"""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor

from fttrain.distributed.collectives import Handle
from fttrain.store.side_stream import Event, SideStream

Bring = Callable[[int, Tensor], Handle | None]  # (layer, slot uint8 (layer_bytes,))


class Slots:
    """``bring(layer, slot)`` fills a slot. It is called on the side stream, in the order of use."""

    def __init__(
        self, count: int, layer_bytes: int, device: torch.device, stream: SideStream, bring: Bring
    ) -> None:
        self._buffers = torch.empty(count, layer_bytes, dtype=torch.uint8, device=device)
        self._stream, self._bring = stream, bring
        self._layers: list[int | None] = [None] * count  # the layer in each slot, or coming into it
        self._handles: list[Handle | None] = [None] * count  # of a fill that nobody waited for yet
        self._released: list[Event] = [stream.record_event()] * count
        self._in_use: set[int] = set()  # layers between acquire and release

    def prefetch(self, layers: Iterable[int]) -> list[int]:
        """Start bringing the first of ``layers`` for which there are slots. Return the layers whose
        fill was started.
        """
        upcoming = list(islice(layers, len(self._layers)))
        started = []
        for layer in upcoming:
            if layer in self._layers:
                continue
            slot = self._free_slot(upcoming)
            if slot is None:
                break
            self._fill(slot, layer)
            started.append(layer)
        return started

    def acquire(self, layer: int) -> Tensor:
        """uint8 (layer_bytes,), complete before the compute that follows; in use until
        ``release``.
        """
        slot = self._layers.index(layer)
        handle, self._handles[slot] = self._handles[slot], None
        if handle is not None:
            handle.wait()
        self._in_use.add(layer)
        return self._buffers[slot]

    def release(self, layer: int) -> None:
        """Allow the slot to be filled again after the compute issued so far."""
        self._in_use.remove(layer)
        self._released[self._layers.index(layer)] = self._stream.record_event()

    def _free_slot(self, upcoming: list[int]) -> int | None:
        for slot, layer in enumerate(self._layers):
            if layer is None or (layer not in self._in_use and layer not in upcoming):
                return slot
        return None

    def _fill(self, slot: int, layer: int) -> None:
        buffer = self._buffers[slot]
        self._layers[slot] = layer
        self._handles[slot] = self._stream.run(
            lambda: self._bring(layer, buffer), self._released[slot]
        )
