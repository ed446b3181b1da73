"""Verification of the frozen base: the bytes that the compute reads against the cache's manifest.

The checksum is taken of a layer's bytes on the device, after a gather or a copy, so it shows a
flipped bit of the disk, the host's memory, the link or the card. All layers are checked at their
first use, then each once every ``verify_every`` steps, some in each step.
"""

from collections.abc import Sequence

from torch import Tensor

from fttrain.memory.device import is_out_of_memory
from fttrain.quant.checksum import checksum
from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.store import Store, Traffic


class VerifiedStore:
    """A store that takes the checksum of layers in ``get``.

    ``expected``: the manifest's checksum of each layer of ``store``; None: not known, the layer is
    not checked. ``verify_every`` 0: the first use only.
    """

    def __init__(self, store: Store, expected: Sequence[int | None], verify_every: int) -> None:
        self._store, self._expected, self._every = store, expected, verify_every
        self._known = [layer for layer, value in enumerate(expected) if value is not None]
        self._due = set(self._known)
        self._checksums: dict[int, Tensor] = {}  # layer -> int64 (), of the bytes on the device

    def __len__(self) -> int:
        return len(self._store)

    def start_step(self, step: int) -> None:
        """Mark the layers that are due in optimizer step ``step``."""
        if self._every:
            self._due |= {layer for layer in self._known if (layer + step) % self._every == 0}

    def mismatched(self) -> list[int]:
        """The layers checked since the last call whose checksum differs from the manifest's.

        The results are read back from the device: call it where the host waits anyway.
        """
        checksums, self._checksums = self._checksums, {}
        return [layer for layer, value in checksums.items() if int(value) != self._expected[layer]]

    def prefetch(self, upcoming: Sequence[int]) -> None:
        self._store.prefetch(upcoming)

    def get(self, layer: int) -> FrozenLayer:
        frozen = self._store.get(layer)
        if layer in self._due:
            self._check(layer, frozen)
        return frozen

    def _check(self, layer: int, frozen: FrozenLayer) -> None:
        try:
            self._checksums[layer] = checksum(frozen.flat)
        except RuntimeError as error:
            # The layer stays due. If its forward runs out of memory, too, all ranks end together.
            if not is_out_of_memory(error):
                raise
        else:
            self._due.remove(layer)

    def release(self, layer: int) -> None:
        self._store.release(layer)

    def take_traffic(self) -> Traffic:
        return self._store.take_traffic()
