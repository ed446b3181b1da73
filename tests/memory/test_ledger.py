"""Big host buffers: refused with figures before anything is loaded; shared where that is said."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_strategy
import torch
import torch.distributed
from ranks import run_ranks

import fttrain.memory.ledger
from fttrain.memory.ledger import MemoryLedger
from fttrain.memory.parts import MemoryPart
from fttrain.memory.pinned import HostBuffer
from fttrain.util.errors import UserError
from fttrain.util.units import GIB

SIZE = 1000


def test_what_does_not_fit_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fttrain.memory.ledger, "available_host_bytes", lambda: 3 * GIB)
    ledger = MemoryLedger(tiny_strategy.this_group())
    ledger.reserve(MemoryPart.HOST_LAYERS, 2 * GIB)
    ledger.reserve(MemoryPart.LAYER_INPUTS, GIB)
    ledger.check()  # to the byte
    ledger.reserve(MemoryPart.HEAD, 1)
    expected = (
        r"3\.00 GiB are needed \(frozen layers in host memory 2\.00 GiB, layer inputs 1\.00 GiB, "
        r"head 0\.00 GiB\), "
        r"3\.00 GiB are available; a smaller schedule\.micro_batch_group, data\.seq_len or "
        r"loop\.micro_batch_size, strategy\.resident_layers nearer to all, layer_inputs=device, or "
        r"closing other programs helps"
    )
    with pytest.raises(UserError, match=expected):
        ledger.check()


def test_a_new_reservation_replaces_the_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fttrain.memory.ledger, "available_host_bytes", lambda: 3 * GIB)
    ledger = MemoryLedger(tiny_strategy.this_group())
    for _ in range(4):
        ledger.reserve(MemoryPart.LAYER_INPUTS, GIB)
    ledger.check()


def test_more_than_this_machine_has_is_refused() -> None:
    ledger = MemoryLedger(tiny_strategy.this_group())
    ledger.reserve(MemoryPart.LAYER_INPUTS, 1 << 60)
    with pytest.raises(UserError, match=r"layer inputs 1073741824\.00 GiB"):
        ledger.check()
    with pytest.raises(UserError, match=r"layer inputs: the system refused"):
        ledger.allocate(MemoryPart.LAYER_INPUTS)


def test_buffers_are_zero_and_apart() -> None:
    ledger = MemoryLedger(tiny_strategy.this_group())
    ledger.reserve(MemoryPart.LAYER_INPUTS, SIZE)
    ledger.reserve(MemoryPart.HOST_LAYERS, SIZE)
    a, b = (
        ledger.allocate(MemoryPart.LAYER_INPUTS),
        ledger.allocate(MemoryPart.HOST_LAYERS),
    )
    for buffer in (a, b):
        assert (buffer.dtype, len(buffer)) == (torch.uint8, SIZE)
        assert not buffer.any()
    a.fill_(7)
    assert not b.any()


def on_rank() -> dict[str, Any]:
    """Buffers of two ranks that need different amounts, and what a check says of too much."""
    group = tiny_strategy.this_group()
    ledger = MemoryLedger(group)
    ledger.reserve(MemoryPart.HOST_LAYERS, SIZE)
    ledger.reserve(MemoryPart.LAYER_INPUTS, SIZE * (1 + group.rank))
    ledger.check()
    shared, own = (
        ledger.allocate(MemoryPart.HOST_LAYERS),
        ledger.allocate(MemoryPart.LAYER_INPUTS),
    )
    shared[group.rank] = own[:] = 1 + group.rank
    group.barrier()
    available = 3 * GIB + group.rank * GIB
    fttrain.memory.ledger.available_host_bytes = lambda: available
    ledger.reserve(MemoryPart.HOST_LAYERS, GIB)
    ledger.reserve(MemoryPart.LAYER_INPUTS, (1 + group.rank) * GIB)
    try:
        ledger.check()
    except UserError as error:
        return {"shared": shared.clone(), "own": own.clone(), "error": str(error)}
    raise AssertionError("4 GiB do not fit into 3")


def test_ranks_of_a_machine_share_what_is_shared() -> None:
    for rank, found in enumerate(run_ranks(on_rank, 2)):
        assert found["shared"].tolist() == [1, 2] + [0] * (SIZE - 2)
        assert found["own"].tolist() == [1 + rank] * (SIZE * (1 + rank))
        # Shared once, own twice as different; the least that any rank sees available.
        assert (
            "4.00 GiB are needed (frozen layers in host memory 1.00 GiB in all, layer inputs"
            in found["error"]
        )
        assert "on each of 2 ranks), 3.00 GiB are available" in found["error"]


def test_memory_is_unlocked_for_the_card_that_it_was_locked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On whichever thread, and whatever card that asks, its last reference goes."""
    asked: list[Any] = []

    class Runtime:
        """CUDA's."""

        def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            asked.append(("unlocked", address))
            return 0

    @contextmanager
    def on(card: int) -> Iterator[None]:
        asked.append(("card", card))
        yield

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("waited"))
    memory = HostBuffer(-1, SIZE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    memory.page_lock(buffer, "a", speak=False)
    address = buffer.data_ptr()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    del memory, buffer
    assert asked == [("card", 1), "waited", ("unlocked", address)]
