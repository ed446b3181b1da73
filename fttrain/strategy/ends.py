"""The two ends of the model, embedding and head: what they take, and how they are loaded."""

import torch
from torch import Tensor

from fttrain.memory.parts import MemoryPart
from fttrain.model.head import chunk_bytes, chunk_rows
from fttrain.model.projection import (
    Projection,
    QuantisedTable,
    StreamedTable,
    Table,
    tile_bytes,
    tiled_format,
)
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.store import FrozenBase
from fttrain.strategy.config import Placement
from fttrain.strategy.recipe import Plan
from fttrain.util.errors import UserError

# Names of the two ends in the frozen base
EMBEDDING, HEAD = "embedding", "head"


def book_ends(plan: Plan, has_embedding: bool, has_head: bool) -> None:
    """Embedding and head of this rank; tied and in one place, the head is the embedding's table.

    Raises UserError for a head that cannot be quantised, also where another rank has it.
    """
    pool, placement = plan.pool, plan.recipe.placement
    quantised = placement.head == "nf4"
    if quantised:
        _check_blocks(plan)
    if placement.embedding == "host":
        pool.reserve(MemoryPart.HOST_EMBEDDING, plan.table_bytes)
    elif has_embedding:
        pool.reserve(MemoryPart.EMBEDDING, plan.table_bytes)
    one_table = plan.architecture.tied and _in_one_place(placement)
    if placement.head == "streamed" and not one_table:
        pool.reserve(MemoryPart.HOST_HEAD, plan.table_bytes)
    if has_head:
        _book_head(plan, one_table and has_embedding)
    if plan.group.device.type == "cpu":  # a table is read where it stays
        loading = quantised and has_head
    else:
        loading = placement.embedding == "device" or placement.head != "streamed"
    if loading:
        pool.reserve(MemoryPart.TABLE_STAGING, plan.table_bytes)


def _book_head(plan: Plan, is_embedding: bool) -> None:
    """What this rank's head takes on the device. ``is_embedding``: its table is booked as such."""
    pool, form = plan.pool, plan.recipe.placement.head
    (vocabulary, _), tokens = _shape(plan), plan.recipe.size.micro_batch_tokens
    factor = QuantisedTable.chunk_factor if form == "nf4" else Table.chunk_factor
    rows, projecting_bytes = chunk_rows(vocabulary, plan.dtype, tokens, factor), 0
    if form == "nf4":
        tiles = _quantised_format(plan)
        pool.reserve(MemoryPart.QUANTIZED_HEAD, tiles.layout.size_bytes)
        projecting_bytes = tile_bytes(tiles, rows)
    elif form == "streamed":
        pool.reserve(MemoryPart.STREAMED_HEAD, plan.table_bytes)
    elif not is_embedding:
        pool.reserve(MemoryPart.HEAD, plan.table_bytes)
    pool.reserve(MemoryPart.LOGITS, chunk_bytes(vocabulary, plan.dtype, rows, projecting_bytes))


def load_ends(
    plan: Plan, base: FrozenBase, has_embedding: bool, has_head: bool
) -> tuple[Tensor | None, Projection | None]:
    """The embedding's table (V, C) and the head's projection, None for an end that another rank
    has.
    """
    placement, device = plan.recipe.placement, plan.group.device
    # A shared table is made by all ranks together, so each must come to the same answer.
    embedding = None
    if placement.embedding == "host":
        embedding = _shared(plan, base, EMBEDDING, MemoryPart.HOST_EMBEDDING)
    elif has_embedding:
        embedding = _loaded(plan, base, EMBEDDING).to(device)
    table = embedding if base.tied and _in_one_place(placement) else None
    if table is None and placement.head == "streamed":
        table = _shared(plan, base, HEAD, MemoryPart.HOST_HEAD)
    projection = _projection(plan, base, table) if has_head else None
    return embedding if has_embedding else None, projection


def _projection(plan: Plan, base: FrozenBase, table: Tensor | None) -> Projection:
    """This rank's. ``table``: the head's, where it is there already."""
    form, device = plan.recipe.placement.head, plan.group.device
    if form == "nf4":
        return QuantisedTable(_loaded(plan, base, HEAD), _quantised_format(plan), device)
    if table is None:
        table = _loaded(plan, base, HEAD).to(device)
    return StreamedTable(table, device) if form == "streamed" else Table(table)


def _in_one_place(placement: Placement) -> bool:
    """Whether embedding and head can be one table."""
    return (placement.embedding, placement.head) in (("device", "resident"), ("host", "streamed"))


def _loaded(plan: Plan, base: FrozenBase, name: str) -> Tensor:
    """Embedding or head (V, C), in host memory of this rank."""
    if plan.group.device.type == "cpu":
        table = torch.empty(_shape(plan), dtype=plan.dtype)
    else:
        table = plan.pool.allocate(MemoryPart.TABLE_STAGING).view(plan.dtype).view(_shape(plan))
    base.read_end(name, table)
    return table


def _shared(plan: Plan, base: FrozenBase, name: str, part: MemoryPart) -> Tensor:
    """Embedding or head (V, C) in the machine's one host copy, which its first rank fills."""
    table = plan.pool.allocate(part).view(plan.dtype).view(_shape(plan))
    if plan.group.intra_node.is_main:
        base.read_end(name, table)
    plan.group.intra_node.barrier()
    return table


def _quantised_format(plan: Plan) -> FrozenFormat:
    """How a head in 4 bits is laid out."""
    return tiled_format(*_shape(plan), _head_quant(plan), plan.dtype)


def _head_quant(plan: Plan) -> QuantConfig:
    """As the layers; NF4 where they are not quantised."""
    quant = plan.recipe.quant
    return quant if quant.is_quantised else QuantConfig(blocksize=quant.blocksize)


def _check_blocks(plan: Plan) -> None:
    hidden, blocksize = plan.architecture.hidden, _head_quant(plan).blocksize
    if hidden % blocksize:
        raise UserError(
            f"head=nf4: rows of {hidden} values are not a multiple of quant.blocksize={blocksize}; "
            "a smaller block size, head=resident or head=streamed helps"
        )


def _shape(plan: Plan) -> tuple[int, int]:
    """(V, C)."""
    return int(plan.architecture.config.vocab_size), plan.architecture.hidden
