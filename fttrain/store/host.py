"""Host store: some layers on the device, the rest in one host copy that a node's ranks share.

    host  [ 0 | 2 | 3 | 5 | 6 | ... ]  page-locked on CUDA, one for all ranks
              |  copy stream
    device  slots [ 2 ][ 3 ]    resident [ 1 ][ 4 ] ...

No rank needs data of another one: any link will do, and so will a single card. Bytes copied in a
pass: all layers that are not resident, less those that are still in the slots where forward turns
into backward. Resident layers are spread evenly, so that all compute hides copies.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer
from fttrain.store import Traffic
from fttrain.store.side_stream import SideStream, copy, copy_stream
from fttrain.store.slots import Slots


def resident_set(layers: int, resident_layers: int) -> frozenset[int]:
    """The ``resident_layers`` of ``layers`` that stay on the device, evenly spread."""
    return frozenset((2 * i + 1) * layers // (2 * resident_layers) for i in range(resident_layers))


class HostStore:
    """``resident``: layer -> uint8 (layer_bytes,) on the device; ``on_host``: the same in host
    memory for all other layers, and for those that are resident on some ranks of the node only.
    """

    def __init__(
        self,
        layers: int,
        resident: Mapping[int, Tensor],
        on_host: Mapping[int, Tensor],
        frozen_format: FrozenFormat,
        device: torch.device,
        slots: int = 2,
        stream: SideStream | None = None,
    ) -> None:
        self._layers, self._resident, self._on_host = layers, resident, on_host
        self._format = frozen_format
        self._stream = stream or copy_stream(device, timed=True)
        self._layer_bytes = frozen_format.layout.size_bytes
        count = slots if len(resident) < layers else 0
        self._slots = Slots(count, self._layer_bytes, device, self._stream, self._copy)
        self._h2d_bytes = 0

    def __len__(self) -> int:
        return self._layers

    def prefetch(self, upcoming: Sequence[int]) -> None:
        moving = (layer for layer in upcoming if layer not in self._resident)
        self._h2d_bytes += self._layer_bytes * len(self._slots.prefetch(moving))

    def get(self, layer: int) -> FrozenLayer:
        resident = self._resident.get(layer)
        flat = self._slots.acquire(layer) if resident is None else resident
        return FrozenLayer(flat, self._format)

    def release(self, layer: int) -> None:
        if layer not in self._resident:
            self._slots.release(layer)

    def take_traffic(self) -> Traffic:
        traffic = Traffic(h2d_bytes=self._h2d_bytes, wait_s=self._stream.take_wait_s())
        self._h2d_bytes = 0
        return traffic

    def _copy(self, layer: int, slot: Tensor) -> None:
        copy(slot, self._on_host[layer])
