"""Where memory goes, and what a run says where it runs out."""

import pytest
import tiny
import tiny_strategy
import torch

from fttrain.memory import report
from fttrain.memory.advice import explain_out_of_memory
from fttrain.memory.host import peak_host_bytes
from fttrain.memory.ledger import Reservation
from fttrain.memory.parts import MemoryPart
from fttrain.memory.report import PartUsage, part_usage, usage_table
from fttrain.util.errors import UserError
from fttrain.util.units import GIB

RESERVATIONS = [
    Reservation(MemoryPart.HOST_HEAD, GIB),
    Reservation(MemoryPart.FROZEN_LAYERS, 3 * GIB),
    Reservation(MemoryPart.ACTIVATIONS, 5 * GIB),
    Reservation(MemoryPart.ADAPTER_MASTERS, 9 * GIB),
]


def test_parts_come_by_size_and_last_what_is_not_booked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "peak_host_bytes", lambda: 20 * GIB)
    assert part_usage(RESERVATIONS, tiny.CPU) == [  # on a CPU all of it is host memory
        PartUsage(MemoryPart.ADAPTER_MASTERS, 0, 9 * GIB),
        PartUsage(MemoryPart.ACTIVATIONS, 0, 5 * GIB),
        PartUsage(MemoryPart.FROZEN_LAYERS, 0, 3 * GIB),
        PartUsage(MemoryPart.HOST_HEAD, 0, GIB),
        PartUsage(MemoryPart.HOST_REMAINDER, 0, 2 * GIB),
    ]


def test_the_table_adds_up_and_leaves_out_what_is_nothing() -> None:
    found = [
        PartUsage(MemoryPart.LOGITS, 3 * GIB),
        PartUsage(MemoryPart.HEAD, 0, GIB // 2),
        PartUsage(MemoryPart.SLOTS, 1000, 1000),
    ]
    assert usage_table(found, "memory of rank 1") == [
        "memory of rank 1, GiB",
        "            device    host",
        "  logits      3.00    0.00",
        "  head        0.00    0.50",
        "  together    3.00    0.50",
    ]


def test_books_of_a_strategy_hold_what_it_has() -> None:
    """The tensors of a strategy are as large as it said, on a CPU where all of them can be seen."""
    strategy = tiny_strategy.build(tiny_strategy.variant(offload=True), tiny_strategy.base())
    reserved = {r.part: r.size_bytes for r in strategy.reservations}
    frozen = tiny_strategy.base()
    layers = [layer.adapters for layer in strategy.decoder.layers]
    assert reserved[MemoryPart.FROZEN_LAYERS] == sum(flat.nbytes for flat in frozen.flats)
    assert reserved[MemoryPart.EMBEDDING] == strategy.decoder.embedding.weight.nbytes
    assert reserved[MemoryPart.ADAPTER_MASTERS] == sum(layer.flat.nbytes for layer in layers)
    assert reserved[MemoryPart.ADAPTERS] == sum(layer.copy_bytes for layer in layers)
    tiny_strategy.apply(strategy, 0)
    moments = strategy.optimizer_state()
    kept = sum(value.nbytes for name, value in moments.items() if "step" not in name)
    assert reserved[MemoryPart.OPTIMIZER_MOMENTS] == kept
    total = sum(use.host_bytes for use in part_usage(strategy.reservations, tiny.CPU))
    assert total == pytest.approx(peak_host_bytes(), rel=0.01)


def test_out_of_memory_is_explained() -> None:
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total of 23.4 GiB"
    message = (
        r"rank 1 ran out of memory on cpu \(Tried to allocate 2\.50 GiB\); the largest parts: "
        r"activations 5\.00 GiB, frozen layers 3\.00 GiB; what frees most: activations=recompute "
        r"with layer_inputs=host, or .*; strategy=shard, stream or pipeline"
    )
    with pytest.raises(UserError, match=message), explain_out_of_memory(RESERVATIONS, 1, tiny.CPU):
        raise torch.OutOfMemoryError(text)


def test_a_cpu_without_memory_is_explained_and_other_errors_are_not() -> None:
    message = "rank 0 ran out of memory on cpu"
    with pytest.raises(UserError, match=message), explain_out_of_memory(RESERVATIONS, 0, tiny.CPU):
        torch.empty(1 << 60, dtype=torch.uint8)
    with (
        pytest.raises(RuntimeError, match="shapes"),
        explain_out_of_memory(RESERVATIONS, 0, tiny.CPU),
    ):
        raise RuntimeError("shapes")
