"""The output projection: the head's frozen table (V, C) on the device, in host memory or in 4 bits.

Legend: m tokens of a chunk, C hidden width, V vocabulary, v rows of a tile. Tensors are in the
compute dtype where no other stands beside them.
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

# Bytes of a tile in the compute dtype: 2048 rows of a 70B model, enough for a GEMM that fills the
# device, and little beside the chunk of logits.
TILE_BYTES = 32 * MIB
TILE_ROWS_MULTIPLE = 64  # a tile's logits begin where kernels can load and store vectors


class Projection(Protocol):
    """The head's table and its two GEMMs, which are only called inside ``on_device()``."""

    dtype: torch.dtype  # the compute dtype
    vocabulary: int  # V
    chunk_factor: int  # size of a chunk of logits, in CHUNK_BYTES

    def on_device(self) -> AbstractContextManager[None]:
        """The table is on the device inside, for all chunks that use it together."""
        ...

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits of ``hidden`` (m, C) into ``out`` (m, V)."""
        ...

    def project_back(self, grad: Tensor) -> Tensor:
        """Gradient of ``hidden`` (m, C) from ``grad`` of the logits (m, V)."""
        ...

    def take_traffic(self) -> Traffic:
        """Traffic to the device since the last call."""
        ...


class ResidentHead:
    """A table on the device, in the compute dtype: lm_head=device."""

    chunk_factor = 1

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # (V, C); the embedding's tensor where they are tied
        self.vocabulary, self.dtype = len(weight), weight.dtype

    def on_device(self) -> AbstractContextManager[None]:
        return nullcontext()

    def project(self, hidden: Tensor, out: Tensor) -> None:
        torch.mm(hidden, self.weight.t(), out=out)

    def project_back(self, grad: Tensor) -> Tensor:
        return grad @ self.weight

    def take_traffic(self) -> Traffic:
        return Traffic()


class StreamedHead(ResidentHead):
    """A table in host memory, on the device inside ``on_device()`` alone: lm_head=host."""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__(weight)
        self._device = device
        self._stream = copy_stream(device, timed=True)
        self._h2d_bytes = 0

    @contextmanager
    def on_device(self) -> Iterator[None]:
        on_host = self.weight
        self.weight = torch.empty_like(on_host, device=self._device)
        # No compute overlaps this copy: the side stream is there to time the wait.
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
    """A table on the device in 4 bits, of which one tile of rows at a time is dequantised:
    lm_head=quantized.

    Every chunk dequantises the table twice, which moves 2.5 bytes a weight. By arithmetic that is
    40 % of its GEMMs' time on an RTX 4090 and 20 % on a 3090 with 512 tokens in a chunk, and four
    times as much with the 128 tokens of ``ResidentHead`` at a vocabulary of 128256: hence the
    ``chunk_factor``.
    """

    chunk_factor = 4

    def __init__(self, table: Tensor, frozen_format: FrozenFormat, device: torch.device) -> None:
        """Quantise ``table`` (V, C), on the host, tile by tile on ``device``."""
        size_bytes = frozen_format.layout.size_bytes
        flat = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
        views = frozen_format.layout.views(flat)
        self._tiles = FrozenLayer(flat, frozen_format)
        self._rows: dict[str, slice] = {}  # tile -> rows of the table
        self.vocabulary, self._hidden = table.shape
        self.dtype, self.quant = frozen_format.dtype, frozen_format.quant
        begin = 0
        for name, shape in frozen_format.groups.items():
            rows = slice(begin, begin + shape.shape[0])
            weight = quantise(table[rows].to(device), self.quant, f"the head's {name}")
            frozen_format.write_quantised(views, name, 0, weight)
            self._rows[name], begin = rows, rows.stop

    def on_device(self) -> AbstractContextManager[None]:
        return nullcontext()

    def project(self, hidden: Tensor, out: Tensor) -> None:
        for name, rows in self._rows.items():
            torch.mm(hidden, self._tiles.weight(name).t(), out=out[:, rows])  # weight (v, C)

    def project_back(self, grad: Tensor) -> Tensor:
        # A sum over dozens of tiles would lose in bf16 what one GEMM retains.
        total = torch.zeros(len(grad), self._hidden, device=grad.device)  # fp32 (m, C)
        for name, rows in self._rows.items():
            total += grad[:, rows] @ self._tiles.weight(name)
        return total.to(self.dtype)

    def take_traffic(self) -> Traffic:
        return Traffic()


def tiled_format(
    vocabulary: int, hidden: int, quant: QuantConfig, dtype: torch.dtype
) -> FrozenFormat:
    """The layout of a ``QuantizedHead``: each tile of its rows is a weight."""
    fitting = TILE_BYTES // (hidden * dtype.itemsize) // TILE_ROWS_MULTIPLE * TILE_ROWS_MULTIPLE
    rows = max(TILE_ROWS_MULTIPLE, fitting)
    tiles = (
        GroupShape(f"rows_{begin}", hidden, (min(rows, vocabulary - begin),))
        for begin in range(0, vocabulary, rows)
    )
    # No tile may outlive its GEMM, also where quant.dequant=layer for the layers.
    return FrozenFormat(tiles, {}, replace(quant, dequant="tile"), dtype)


def tile_bytes(frozen_format: FrozenFormat, chunk_rows: int) -> int:
    """Workspace bytes of a ``QuantizedHead``: a dequantised tile with its fp32 scales, the fp32
    gradient of ``chunk_rows`` tokens and a tile's share in it.
    """
    shapes = [shape.shape for shape in frozen_format.groups.values()]
    weights, itemsize = max(map(math.prod, shapes)), frozen_format.dtype.itemsize
    scales_bytes = 4 * weights // frozen_format.quant.blocksize
    gradient_bytes = chunk_rows * shapes[0][1] * (4 + itemsize)
    return weights * itemsize + scales_bytes + gradient_bytes
