"""Strategies on a GPU: copies and gathers beside the compute change nothing that is computed."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import tiny_store
import tiny_strategy
import torch
from ranks import become_rank, run_ranks
from torch import Tensor

from fttrain.distributed.process_group import process_group
from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.ledger import MemoryLedger
from fttrain.memory.parts import MemoryPart
from fttrain.memory.pinned import HostBuffer
from fttrain.rig.config import RigConfig
from fttrain.rig.device_setup import set_up_rank
from fttrain.store.host import HostStore
from fttrain.store.sharded import ShardedStore

pytestmark = pytest.mark.cuda
ON_HOST = {"embedding": "host", "lm_head": "host", "layer_inputs": "host", "offload": True}
MIXED = ("recompute*2", "offload", "keep", "offload")
VARIANTS: dict[str, dict[str, Any]] = {
    "shard": {"strategy": "shard"},
    "stream": {"strategy": "stream"},
    "stream, some resident": {"strategy": "stream", "resident_layers": 2, "slots": 3},
    "stream, all on the host": {"strategy": "stream", **ON_HOST},
    "stream, all on the host, in groups": {"strategy": "stream", "group": 3, **ON_HOST},
    "replicate, kept": {"activations": "keep"},
    "activations offloaded": {"activations": "offload", "group": 1},
    "activations by layer": {"strategy": "stream", "activations": MIXED, **ON_HOST},
    "pipeline": {"strategy": "pipeline", **ON_HOST},
    "optimizer in parts": {"shard": True},
    "optimizer in parts, on the host": {"strategy": "stream", "shard": True, **ON_HOST},
    "head in 4 bits": {"strategy": "stream", "embedding": "host", "lm_head": "quantized"},
    "MLP in tiles": {"mlp_tile_tokens": 1024},
}
TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
BACKENDS = [pytest.param("nccl", marks=TWO_CARDS), "gloo"]
LAYERS = 7
LAG_CYCLES = 2_000_000  # about a millisecond


def on_gpu() -> RankGroup:
    return RankGroup(0, 1, 0, torch.device("cuda", torch.cuda.current_device()))


def outcome(
    ranks: RankGroup | None = None, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of four steps, and the adapters that they led to, on rank 0."""
    frozen = tiny_strategy.base(dtype="bfloat16")
    spec = tiny_strategy.variant(dtype="bfloat16", **settings)
    strategy = tiny_strategy.build(spec, frozen, ranks or on_gpu())
    losses = [tiny_strategy.apply(strategy, step).loss for step in range(4)]
    answers = strategy.generate([[3, 4, 5], [6]], 4, set())
    assert [len(answer) for answer in answers] == [4, 4]
    strategy.optimizer_state()  # of all ranks: whatever it is, it comes together
    found = strategy.adapter_state()
    return losses, {name: value.detach().to("cpu", copy=True) for name, value in found.items()}


@contextmanager
def on_two(backend: str, device: str = "cuda") -> Iterator[RankGroup]:
    """This rank among those of ``run_ranks``, as a run joins them."""
    where = set_up_rank(RigConfig(device, threads=1, backend=backend))
    with process_group(where, backend) as group:
        yield group


def of_two(backend: str, names: list[str]) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    with on_two(backend) as ranks:
        return {name: outcome(ranks, **VARIANTS[name]) for name in names}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_strategy_trains_as_replicate_does(name: str) -> None:
    settings = VARIANTS[name]
    same_model = (
        {"lm_head": "quantized"} if settings.get("head") == "nf4" else {}
    )  # it is another one
    expected_losses, expected = outcome(**same_model)
    losses, adapters = outcome(**settings)
    # Flash attention's backward adds in any order, so bits may differ.
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert tiny.difference(adapters, expected) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_train_as_one_does(backend: str) -> None:
    """Over NCCL on a card each, and over gloo, where they may share one."""
    names = [name for name in VARIANTS if VARIANTS[name].get("head") != "nf4"]
    expected_losses, expected = outcome()
    found, _ = run_ranks(of_two, 2, backend, names, timeout_s=600, process_group=False)
    for name, (losses, adapters) in found.items():
        assert losses == pytest.approx(expected_losses, rel=1e-3), name
        assert tiny.difference(adapters, expected) < 1e-2, name


def contexts() -> list[bool]:
    """Of each card whether this process, a rank that computes on the second one, has set it up."""
    become_rank(1, 2, 0)
    device = set_up_rank(RigConfig("cuda", threads=1))
    spec = tiny_strategy.variant(dtype="bfloat16", strategy="stream", **ON_HOST)
    group = RankGroup(0, 1, 1, device)
    strategy = tiny_strategy.build(spec, tiny_strategy.base(dtype="bfloat16"), group)
    for step in range(2):
        tiny_strategy.apply(strategy, step)
    strategy.optimizer_state()
    del strategy
    gc.collect()
    return [torch._C._cuda_hasPrimaryContext(card) for card in range(2)]


@TWO_CARDS
def test_a_rank_sets_up_no_card_but_its_own() -> None:
    (found,) = run_ranks(contexts, 1, process_group=False)
    assert found == [False, True]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_host_waits_for_nothing_in_forward_and_backward(name: str) -> None:
    spec = tiny_strategy.variant(dtype="bfloat16", **VARIANTS[name])
    strategy = tiny_strategy.build(spec, tiny_strategy.base(dtype="bfloat16"), on_gpu())
    tiny_strategy.apply(strategy, 0)  # what is made at the first use may be waited for
    batches = tiny_strategy.micro_batches(strategy, 1)
    strategy._gradients.start()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attempt = strategy._forward_backward(batches, lambda batch: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(attempt.loss_sum) > 0


@pytest.mark.parametrize("kind", ["host", "sharded"])
def test_no_slot_is_overwritten_while_the_device_lags_behind(kind: str) -> None:
    group, flats = on_gpu(), tiny_store.flats(LAYERS)
    if kind == "host":
        ledger = MemoryLedger(group)
        ledger.reserve(MemoryPart.OFFLOADED_ACTIVATIONS, LAYERS * tiny_store.LAYER_BYTES)
        on_host = ledger.allocate(MemoryPart.OFFLOADED_ACTIVATIONS).view(LAYERS, -1)
        on_host.copy_(torch.stack(flats))
        layers = dict(enumerate(on_host))
        store: Any = HostStore(LAYERS, {}, layers, tiny_store.FORMAT, group.device)
    else:
        shards = [flat.to(group.device) for flat in flats]
        store = ShardedStore(shards, tiny_store.FORMAT, group)
    found: list[tuple[int, Tensor]] = []
    for order in tiny_store.passes_up_and_down(LAYERS, 12):
        for place, layer in enumerate(order):
            store.prefetch(order[place:])
            flat = store.get(layer).flat
            torch.cuda._sleep(LAG_CYCLES)  # the host runs ahead: copies are asked for meanwhile
            found.append((layer, flat.clone()))
            store.release(layer)
    for layer, flat in found:
        assert torch.equal(flat.cpu(), flats[layer])


def test_memory_that_cannot_be_page_locked_is_told_and_harms_no_kernel(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ledger = MemoryLedger(on_gpu())
    ledger.reserve(MemoryPart.LAYER_INPUTS, 1 << 20)
    buffer = ledger.allocate(MemoryPart.LAYER_INPUTS)
    HostBuffer(-1, 1 << 20).page_lock(buffer, "a", speak=False)  # for the second time
    assert "warning: a: 0.00 GiB could not be page-locked" in capsys.readouterr().err
    assert float(torch.ones(3, device="cuda").add_(1).sum()) == 6


def test_memory_is_given_back_unlocked() -> None:
    ledger = MemoryLedger(on_gpu())
    ledger.reserve(MemoryPart.LAYER_INPUTS, 1 << 20)
    for _ in range(50):  # where it stayed registered a second one at its address would be refused
        assert ledger.allocate(MemoryPart.LAYER_INPUTS).is_pinned()
