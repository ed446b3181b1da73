"""Sharded store: each rank of a node keeps 1 / world_size of every layer, and a layer is gathered
into a slot before its use.

    rank 0 [ a ]   rank 1 [ b ]    --- all_gather --->    slot [ a | b ] on both

A rank receives (world_size - 1) / world_size of a layer's bytes for each layer that it gathers.
Each node has the whole base, so no layer travels between nodes.
A pass gathers every layer, less those that are still in the slots where forward turns into
backward.
"""

from collections.abc import Sequence

from torch import Tensor

from fttrain.distributed.collectives import Handle, all_gather
from fttrain.distributed.rank_group import RankGroup
from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer
from fttrain.quant.layout import FLAT_MULTIPLE_BYTES
from fttrain.store import Traffic
from fttrain.store.side_stream import SideStream, collective_stream
from fttrain.store.slots import Slots
from fttrain.util.errors import UserError

SLOTS = 2  # one computes, one fills


def shard_bytes(layer_bytes: int, world_size: int) -> int:
    """Bytes of a layer that each rank keeps.

    Raises UserError for a world_size that does not divide every layer.
    """
    if FLAT_MULTIPLE_BYTES % world_size:
        raise UserError(
            f"strategy=shard: a layer's bytes do not divide among {world_size} ranks (any number "
            "up to 8 does); fewer ranks, strategy=stream or strategy=pipeline help"
        )
    return layer_bytes // world_size


class ShardedStore:
    """``shards``: this rank's uint8 (layer_bytes / world_size,) of each layer, on the device;
    ``group``: the ranks that hold the other shards, and this one.
    """

    def __init__(
        self,
        shards: list[Tensor],
        frozen_format: FrozenFormat,
        group: RankGroup,
        stream: SideStream | None = None,
    ) -> None:
        self._shards, self._format, self._ranks = shards, frozen_format, group.process_group
        self._stream = stream or collective_stream(group.device, timed=True)
        layer_bytes = frozen_format.layout.size_bytes
        self._received_bytes = layer_bytes - shard_bytes(layer_bytes, group.world_size)
        self._slots = Slots(SLOTS, layer_bytes, group.device, self._stream, self._gather)
        self._gather_bytes = 0

    def __len__(self) -> int:
        return len(self._shards)

    def prefetch(self, upcoming: Sequence[int]) -> None:
        self._gather_bytes += self._received_bytes * len(self._slots.prefetch(upcoming))

    def get(self, layer: int) -> FrozenLayer:
        return FrozenLayer(self._slots.acquire(layer), self._format)

    def release(self, layer: int) -> None:
        self._slots.release(layer)

    def take_traffic(self) -> Traffic:
        traffic = Traffic(gather_bytes=self._gather_bytes, wait_s=self._stream.take_wait_s())
        self._gather_bytes = 0
        return traffic

    def _gather(self, layer: int, slot: Tensor) -> Handle:
        return all_gather(slot, self._shards[layer], self._ranks)
