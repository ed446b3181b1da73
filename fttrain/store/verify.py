"""Watches over the frozen base: what the compute reads is compared with the cache's manifest.

A layer's checksum is taken of the bytes as the device has them, after a gather or a copy: a flipped
bit of the disk, the host's memory, the link or the card shows alike. All layers are checked when
they are used for the first time, then each once every ``verify_every`` steps, some in each step.
"""

from collections.abc import Sequence

from torch import Tensor

from fttrain.memory.device import is_out_of_memory
from fttrain.quant.checksum import checksum
from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.store import Store, Traffic


class VerifiedStore:
    """A store whose layers are checked on their way out.

    ``expected``: the manifest's checksum of each layer of ``store``, None: there is nothing to
    compare it with. ``verify_every`` 0: the first use only.
    """

    def __init__(self, store: Store, expected: Sequence[int | None], verify_every: int) -> None:
        self._store, self._expected, self._every = store, expected, verify_every
        self._known = [layer for layer, sum_ in enumerate(expected) if sum_ is not None]
        self._due = set(self._known)
        self._found: dict[int, Tensor] = {}  # layer -> int64 (), as the device has it

    def __len__(self) -> int:
        return len(self._store)

    def start_step(self, step: int) -> None:
        """Choose the layers that are checked in optimizer step ``step``."""
        if self._every:
            self._due |= {layer for layer in self._known if (layer + step) % self._every == 0}

    def mismatched(self) -> list[int]:
        """The layers, among those checked since the last call, that are not what they were made.

        Reads the results back from the device: call it where the host waits for it anyway.
        """
        found, self._found = self._found, {}
        return [layer for layer, sum_ in found.items() if int(sum_) != self._expected[layer]]

    def prefetch(self, upcoming: Sequence[int]) -> None:
        self._store.prefetch(upcoming)

    def get(self, layer: int) -> FrozenLayer:
        frozen = self._store.get(layer)
        if layer in self._due:
            self._check(layer, frozen)
        return frozen

    def _check(self, layer: int, frozen: FrozenLayer) -> None:
        try:
            self._found[layer] = checksum(frozen.flat)
        except RuntimeError as error:
            # It stays due. Ranks end together where the layer itself finds no memory.
            if not is_out_of_memory(error):
                raise
        else:
            self._due.remove(layer)

    def release(self, layer: int) -> None:
        self._store.release(layer)

    def take_traffic(self) -> Traffic:
        return self._store.take_traffic()
