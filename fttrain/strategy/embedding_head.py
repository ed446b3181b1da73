"""Embedding and head: their reservations, and their loading."""

import torch
from torch import Tensor

from fttrain.memory.parts import MemoryPart
from fttrain.model.head import chunk_bytes, chunk_rows
from fttrain.model.projection import (
    Projection,
    QuantizedHead,
    ResidentHead,
    StreamedHead,
    tile_bytes,
    tiled_format,
)
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.store import FrozenBase
from fttrain.strategy.config import Placement
from fttrain.strategy.context import BuildContext
from fttrain.util.errors import UserError

# Names in the frozen base
EMBEDDING, HEAD = "embedding", "head"


def reserve_ends(context: BuildContext, has_embedding: bool, has_head: bool) -> None:
    """Reserve embedding and head of this rank. Where they are tied and both on the device, or both
    on the host, they are one table.

    Raises UserError, on all ranks, for a head that cannot be quantised.
    """
    ledger, placement = context.ledger, context.spec.placement
    quantised = placement.lm_head == "quantized"
    if quantised:
        _check_blocks(context)
    if placement.embedding == "host":
        ledger.reserve(MemoryPart.HOST_EMBEDDING, context.table_bytes)
    elif has_embedding:
        ledger.reserve(MemoryPart.EMBEDDING, context.table_bytes)
    one_table = context.architecture.tied and _same_placement(placement)
    if placement.lm_head == "host" and not one_table:
        ledger.reserve(MemoryPart.HOST_HEAD, context.table_bytes)
    if has_head:
        _reserve_head(context, one_table and has_embedding)
    if context.group.device.type == "cpu":  # a table is read into its final memory
        loading = quantised and has_head
    else:
        loading = placement.embedding == "device" or placement.lm_head != "host"
    if loading:
        ledger.reserve(MemoryPart.TABLE_STAGING, context.table_bytes)


def _reserve_head(context: BuildContext, is_embedding: bool) -> None:
    """Reserve this rank's head on the device. ``is_embedding``: the table is reserved as the
    embedding.
    """
    ledger, form = context.ledger, context.spec.placement.lm_head
    (vocabulary, _), tokens = _shape(context), context.spec.size.micro_batch_tokens
    factor = QuantizedHead.chunk_factor if form == "quantized" else ResidentHead.chunk_factor
    rows, projecting_bytes = chunk_rows(vocabulary, context.dtype, tokens, factor), 0
    if form == "quantized":
        tiles = _quantised_format(context)
        ledger.reserve(MemoryPart.QUANTIZED_HEAD, tiles.layout.size_bytes)
        projecting_bytes = tile_bytes(tiles, rows)
    elif form == "host":
        ledger.reserve(MemoryPart.STREAMED_HEAD, context.table_bytes)
    elif not is_embedding:
        ledger.reserve(MemoryPart.HEAD, context.table_bytes)
    ledger.reserve(
        MemoryPart.LOGITS, chunk_bytes(vocabulary, context.dtype, rows, projecting_bytes)
    )


def load_ends(
    context: BuildContext, base: FrozenBase, has_embedding: bool, has_head: bool
) -> tuple[Tensor | None, Projection | None]:
    """The embedding's table (V, C) and the head's projection; None for one that this rank does not
    have.
    """
    placement, device = context.spec.placement, context.group.device
    # All ranks of a node load a shared table together, whether they use it or not.
    embedding = None
    if placement.embedding == "host":
        embedding = _load_shared_table(context, base, EMBEDDING, MemoryPart.HOST_EMBEDDING)
    elif has_embedding:
        embedding = _load_table(context, base, EMBEDDING).to(device)
    table = embedding if base.tied and _same_placement(placement) else None
    if table is None and placement.lm_head == "host":
        table = _load_shared_table(context, base, HEAD, MemoryPart.HOST_HEAD)
    projection = _projection(context, base, table) if has_head else None
    return embedding if has_embedding else None, projection


def _projection(context: BuildContext, base: FrozenBase, table: Tensor | None) -> Projection:
    """This rank's head. ``table`` (V, C): the head's, where it is loaded already."""
    form, device = context.spec.placement.lm_head, context.group.device
    if form == "quantized":
        return QuantizedHead(_load_table(context, base, HEAD), _quantised_format(context), device)
    if table is None:
        table = _load_table(context, base, HEAD).to(device)
    return StreamedHead(table, device) if form == "host" else ResidentHead(table)


def _same_placement(placement: Placement) -> bool:
    """Whether tied embedding and head can be one table."""
    return (placement.embedding, placement.lm_head) in (("device", "device"), ("host", "host"))


def _load_table(context: BuildContext, base: FrozenBase, name: str) -> Tensor:
    """The embedding's or the head's table (V, C), in host memory of this rank."""
    if context.group.device.type == "cpu":
        table = torch.empty(_shape(context), dtype=context.dtype)
    else:
        table = (
            context.ledger.allocate(MemoryPart.TABLE_STAGING)
            .view(context.dtype)
            .view(_shape(context))
        )
    base.read_end(name, table)
    return table


def _load_shared_table(
    context: BuildContext, base: FrozenBase, name: str, part: MemoryPart
) -> Tensor:
    """The embedding's or the head's table (V, C) in the node's one host copy, which its first rank
    fills.
    """
    table = context.ledger.allocate(part).view(context.dtype).view(_shape(context))
    if context.group.intra_node.is_main:
        base.read_end(name, table)
    context.group.intra_node.barrier()
    return table


def _quantised_format(context: BuildContext) -> FrozenFormat:
    """The layout of a head in 4 bits."""
    return tiled_format(*_shape(context), _head_quant(context), context.dtype)


def _head_quant(context: BuildContext) -> QuantConfig:
    """The head's quantisation: that of the layers; NF4 where they are not quantised."""
    quant = context.spec.quant
    return quant if quant.is_quantised else QuantConfig(blocksize=quant.blocksize)


def _check_blocks(context: BuildContext) -> None:
    hidden, blocksize = context.architecture.hidden, _head_quant(context).blocksize
    if hidden % blocksize:
        raise UserError(
            f"lm_head=quantized: rows of {hidden} values are not a multiple of "
            f"quant.blocksize={blocksize}; "
            "a smaller block size, lm_head=device or lm_head=host helps"
        )


def _shape(context: BuildContext) -> tuple[int, int]:
    """(V, C)."""
    return int(context.architecture.config.vocab_size), context.architecture.hidden
