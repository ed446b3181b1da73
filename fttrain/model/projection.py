"""The output projection: the head's frozen table (V, C), in the three forms that a run may keep it.

Legend: m tokens of a chunk, C hidden width, V vocabulary, v rows of a tile.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer, GroupShape
from fttrain.quant.scheme import quantise
from fttrain.store import Traffic
from fttrain.store.side_stream import copy, copy_stream
from fttrain.util.units import MIB

# Of a tile in the compute dtype: 2048 rows of a 70B model, enough for a GEMM that fills the device
# and little beside the chunk of logits.
TILE_BYTES = 32 * MIB
TILE_ROWS_MULTIPLE = 64  # so that a tile's logits begin where kernels read and write vectorised


class Projection(Protocol):
    """What the head asks of its table. The two GEMMs are only called inside ``brought()``."""

    dtype: torch.dtype  # that computes
    vocabulary: int
    chunk_factor: int  # by how much its chunks of tokens are larger than CHUNK_BYTES

    def brought(self) -> AbstractContextManager[None]:
        """Have the table where it is used, for all chunks that use it together."""
        ...

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """``hidden`` (m, C) -> logits, into ``out`` (m, V)."""
        ...

    def project_back(self, grad: Tensor) -> Tensor:
        """Gradient of the logits (m, V) -> of what was projected (m, C)."""
        ...

    def take_traffic(self) -> Traffic:
        """What was copied to the device since the last call."""
        ...


class ResidentHead:
    """On the device, in the compute dtype."""

    chunk_factor = 1

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # (V, C); the embedding's tensor where they are tied
        self.vocabulary, self.dtype = len(weight), weight.dtype

    def brought(self) -> AbstractContextManager[None]:
        return nullcontext()

    def project(self, hidden: Tensor, out: Tensor) -> None:
        torch.mm(hidden, self.weight.t(), out=out)

    def project_back(self, grad: Tensor) -> Tensor:
        return grad @ self.weight

    def take_traffic(self) -> Traffic:
        return Traffic()


class StreamedHead(ResidentHead):
    """In host memory; on the device for the length of ``brought()``."""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__(weight)
        self._device = device
        self._stream = copy_stream(device, timed=True)
        self._h2d_bytes = 0

    @contextmanager
    def brought(self) -> Iterator[None]:
        on_host = self.weight
        self.weight = torch.empty_like(on_host, device=self._device)
        # The compute has nothing else to do meanwhile: the side stream is there to time the wait.
        self._stream.run(partial(copy, self.weight, on_host)).wait()
        self._h2d_bytes += on_host.nbytes
        try:
            yield
        finally:
            self.weight = on_host

    def take_traffic(self) -> Traffic:
        moved, self._h2d_bytes = self._h2d_bytes, 0
        return Traffic(h2d_bytes=moved, wait_s=self._stream.take_wait_s())


class QuantizedHead:
    """On the device, in 4 bits; one tile of its rows after the other is dequantised and used.

    Every chunk dequantises the table twice, which moves 2.5 bytes a weight. By arithmetic that is
    40 % of its GEMMs' time on an RTX 4090 and 20 % on a 3090 with 512 tokens in a chunk, and four
    times as much with the 128 that ``ResidentHead`` has of a vocabulary of 128256: hence the
    factor.
    """

    chunk_factor = 4

    def __init__(self, table: Tensor, frozen_format: FrozenFormat, device: torch.device) -> None:
        """``table`` (V, C), on the host, is quantised tile by tile on ``device``."""
        size_bytes = frozen_format.layout.size_bytes
        flat = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
        views = frozen_format.layout.views(flat)
        self._tiles = FrozenLayer(flat, frozen_format)
        self._rows: dict[str, slice] = {}  # of the table, by tile
        self.vocabulary, self._hidden = table.shape
        self.dtype, self.quant = frozen_format.dtype, frozen_format.quant
        begin = 0
        for name, shape in frozen_format.groups.items():
            rows = slice(begin, begin + shape.shape[0])
            weight = quantise(table[rows].to(device), self.quant, f"the head's {name}")
            frozen_format.write_quantised(views, name, 0, weight)
            self._rows[name], begin = rows, rows.stop

    def brought(self) -> AbstractContextManager[None]:
        return nullcontext()

    def project(self, hidden: Tensor, out: Tensor) -> None:
        for name, rows in self._rows.items():
            torch.mm(hidden, self._tiles.weight(name).t(), out=out[:, rows])

    def project_back(self, grad: Tensor) -> Tensor:
        # fp32: a sum over dozens of tiles would lose what one GEMM keeps.
        total = torch.zeros(len(grad), self._hidden, device=grad.device)
        for name, rows in self._rows.items():
            total += grad[:, rows] @ self._tiles.weight(name)
        return total.to(self.dtype)

    def take_traffic(self) -> Traffic:
        return Traffic()


def tiled_format(
    vocabulary: int, hidden: int, quant: QuantConfig, dtype: torch.dtype
) -> FrozenFormat:
    """How a ``QuantizedHead`` is laid out: each tile of its rows a weight of its own."""
    fitting = TILE_BYTES // (hidden * dtype.itemsize) // TILE_ROWS_MULTIPLE * TILE_ROWS_MULTIPLE
    rows = max(TILE_ROWS_MULTIPLE, fitting)
    tiles = (
        GroupShape(f"rows_{begin}", hidden, (min(rows, vocabulary - begin),))
        for begin in range(0, vocabulary, rows)
    )
    # Whatever the layers do, no tile may outlive its GEMM.
    return FrozenFormat(tiles, {}, replace(quant, dequant="tile"), dtype)


def tile_bytes(frozen_format: FrozenFormat, chunk_rows: int) -> int:
    """What a ``QuantizedHead`` takes while it is used: a tile with its fp32 scales, the fp32
    gradient of ``chunk_rows`` tokens and a tile's share in it.
    """
    shapes = [shape.shape for shape in frozen_format.groups.values()]
    weights, itemsize = max(map(math.prod, shapes)), frozen_format.dtype.itemsize
    scales_bytes = 4 * weights // frozen_format.quant.blocksize
    gradient_bytes = chunk_rows * shapes[0][1] * (4 + itemsize)
    return weights * itemsize + scales_bytes + gradient_bytes
