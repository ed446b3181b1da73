"""Where memory goes, and what a run says where it runs out."""

import pytest
import tiny
import tiny_strategy
import torch

from fttrain.memory import report
from fttrain.memory.advice import explain_out_of_memory
from fttrain.memory.host import peak_host_bytes
from fttrain.memory.ledger import Reservation
from fttrain.memory.report import PartUsage, part_usage, usage_table
from fttrain.util.errors import UserError
from fttrain.util.units import GIB

BOOKINGS = [
    Reservation("head", GIB, "shared"),
    Reservation("frozen layers", 3 * GIB, "device"),
    Reservation("activations", 5 * GIB, "device"),
    Reservation("adapter masters", 9 * GIB, "host"),
]


def test_parts_come_by_size_and_last_what_is_not_booked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "peak_host_bytes", lambda: 20 * GIB)
    assert part_usage(BOOKINGS, tiny.CPU) == [  # on a CPU all of it is host memory
        PartUsage("adapter masters", 0, 9 * GIB),
        PartUsage("activations", 0, 5 * GIB),
        PartUsage("frozen layers", 0, 3 * GIB),
        PartUsage("head", 0, GIB),
        PartUsage("interpreter, libraries, kernels and what they pass on", 0, 2 * GIB),
    ]


def test_the_table_adds_up_and_leaves_out_what_is_nothing() -> None:
    found = [
        PartUsage("layers", 3 * GIB),
        PartUsage("head", 0, GIB // 2),
        PartUsage("crumbs", 1000, 1000),
    ]
    assert usage_table(found, "memory of rank 1") == [
        "memory of rank 1, GiB",
        "            device    host",
        "  layers      3.00    0.00",
        "  head        0.00    0.50",
        "  together    3.00    0.50",
    ]


def test_books_of_a_strategy_hold_what_it_has() -> None:
    """The tensors of a strategy are as large as it said, on a CPU where all of them can be seen."""
    strategy = tiny_strategy.build(tiny_strategy.variant(offload=True), tiny_strategy.base())
    booked = {booking.what: booking.size_bytes for booking in strategy.bookings}
    frozen = tiny_strategy.base()
    layers = [layer.adapters for layer in strategy.decoder.layers]
    assert booked["frozen layers"] == sum(flat.nbytes for flat in frozen.flats)
    assert booked["embedding"] == strategy.decoder.embedding.weight.nbytes
    assert booked["adapter masters"] == sum(layer.flat.nbytes for layer in layers)
    assert booked["adapters"] == sum(layer.copy_bytes for layer in layers)
    tiny_strategy.apply(strategy, 0)
    moments = strategy.optimizer_state()
    kept = sum(value.nbytes for name, value in moments.items() if "step" not in name)
    assert booked["optimizer moments"] == kept
    total = sum(use.host_bytes for use in part_usage(strategy.bookings, tiny.CPU))
    assert total == pytest.approx(peak_host_bytes(), rel=0.01)


def test_out_of_memory_is_explained() -> None:
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total of 23.4 GiB"
    message = (
        r"rank 1 ran out of memory on cpu \(Tried to allocate 2\.50 GiB\); the largest parts: "
        r"activations 5\.00 GiB, frozen layers 3\.00 GiB; what frees most: activations=recompute "
        r"with boundaries=host, or .*; strategy=shard, stream or pipeline"
    )
    with pytest.raises(UserError, match=message), explain_out_of_memory(BOOKINGS, 1, tiny.CPU):
        raise torch.OutOfMemoryError(text)


def test_a_cpu_without_memory_is_explained_and_other_errors_are_not() -> None:
    message = "rank 0 ran out of memory on cpu"
    with pytest.raises(UserError, match=message), explain_out_of_memory(BOOKINGS, 0, tiny.CPU):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(BOOKINGS, 0, tiny.CPU):
        raise RuntimeError("shapes")
