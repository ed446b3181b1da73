"""What is predicted on fake tensors against what the real strategies take: live bytes of real
tensors on two gloo ranks, with more layers and micro-batches than the prediction was made from.
"""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch
from ranks import run_ranks
from torch import Tensor
from transformers import LlamaConfig

from fttrain.memory.parts import Location, MemoryPart
from fttrain.model.attention_op import cuda_backward_bytes
from fttrain.model.decoder import Architecture
from fttrain.optim.config import OptimConfig
from fttrain.plan import memory, workspace
from fttrain.plan.fake import EmptyBase, full_batch
from fttrain.plan.live_bytes import LiveBytes
from fttrain.strategy.builder import StrategyBuilder
from fttrain.strategy.spec import StepSize, StrategySpec

LAYERS, ACCUMULATION, RANKS = 6, 3, 2
SHAPE = {"num_hidden_layers": LAYERS, "hidden_size": 128}
SIZE = StepSize(2, 96, ACCUMULATION)
ROOMY = [1 << 50] * RANKS
LONG_ROWS = Architecture(tiny.model(hidden_size=64, head_dim=128, intermediate_size=64).config)
TOLERANCE = 0.03  # most are exact; a step of several groups keeps a little of the one before
VARIANTS: dict[str, dict[str, Any]] = {
    "replicate": {},
    "shard": {"strategy": "shard", "activations": "offload", "shard": True, "group": 1},
    "stream": {
        "strategy": "stream",
        "resident_layers": 3,
        "group": 1,
        "activations": "keep",
        "dtype": "bfloat16",
        "lm_head": "quantized",
    },
    "host": {
        "strategy": "stream",
        "group": 1,
        "offload": True,
        "layer_inputs": "host",
        "embedding": "host",
        "lm_head": "host",
    },
    "pipeline": {"strategy": "pipeline"},
}


def test_of_a_card_s_live_bytes_those_of_the_host_are_none() -> None:
    """A layer's random bytes on the host stay while the steps on the card are measured."""
    with LiveBytes("meta") as live:  # stands in for the card
        on_host = torch.ones(1000, dtype=torch.uint8)
        there = torch.zeros(70, dtype=torch.uint8, device="meta")
    assert (live.peak, live.now) == (there.nbytes, there.nbytes)
    del there
    assert live.now == 0
    assert on_host.nbytes == 1000


class Zeros(EmptyBase):
    """Real bytes, all zero, and nothing beside them."""

    def read(self, layer: int, into: Tensor, offset_bytes: int = 0) -> None:
        into.zero_()

    def read_end(self, name: str, into: Tensor) -> None:
        into.zero_()


def architecture() -> Architecture:
    return Architecture(tiny.model(**SHAPE).config)


def spec(name: str) -> StrategySpec:
    return replace(tiny_strategy.variant(verify_every=0, **VARIANTS[name]), size=SIZE)


def measured_bytes(names: list[str]) -> dict[str, int]:
    """On this rank: the most that a second step has alive on the device."""
    found = {}
    for name in names:
        own = spec(name)
        a, group = architecture(), tiny_strategy.this_group()
        frozen_format = a.frozen_format(own.quant, getattr(torch, own.dtype))
        with LiveBytes(kind="cuda") as live:
            blueprint = StrategyBuilder(own, a, frozen_format, group)
            strategy: Any = blueprint.build(Zeros(LAYERS, a.tied), lambda done, total: None)
            _, places = strategy.data_parallel
            count = ACCUMULATION * (RANKS // places)
            for step in range(2):  # the first one makes the optimizer's state
                live.start_peak()
                with live.elsewhere():
                    batches = [full_batch(SIZE, index) for index in range(count)]
                strategy.train_step(batches, step, 1e-3, lambda loss, norm: True)
            strategy.update.settle()
        # Neither is allocated where live bytes are counted: moments are made on a thread.
        apart = (MemoryPart.TABLE_STAGING, MemoryPart.OPTIMIZER_MOMENTS)
        on_host = [
            r
            for r in strategy.reservations
            if r.location is not Location.DEVICE and r.part not in apart
        ]
        found[name] = live.peak - sum(reservation.size_bytes for reservation in on_host)
    return found


def test_predicted_peaks_are_those_of_real_steps() -> None:
    names = list(VARIANTS)
    measured = run_ranks(measured_bytes, RANKS, names)
    for name in names:
        own = spec(name)
        a = architecture()
        reserved = [
            memory.reserved_memory(rank) for rank in memory.reserve_ranks(own, a, "cuda", ROOMY)
        ]
        for rank in workspace.with_workspace(reserved, own, a, "cuda"):
            real = measured[rank.rank][name]
            assert rank.device_bytes == pytest.approx(real, rel=TOLERANCE), (name, rank)


def beyond_reserved(kind: str, documents: int) -> int:
    """Of rows for which attention's backward takes most."""
    size = StepSize(2, 16384, 1, row_documents=documents)
    own = replace(tiny_strategy.variant(dtype="bfloat16"), size=size)
    context = memory.reserve_ranks(own, LONG_ROWS, "cpu", ROOMY[:1])[0].context
    return workspace.beyond_reserved(context, kind)


def inside_bytes(documents: int) -> int:
    a = LONG_ROWS
    return cuda_backward_bytes(2 * 16384, 2 * documents, a.heads, a.kv_heads, a.head_dim, 2)


def test_a_card_has_room_for_what_flash_attention_takes_inside() -> None:
    """On the CPU what follows takes most, a little more than attention's backward without that."""
    more = beyond_reserved("cuda", 1) - beyond_reserved("cpu", 1)
    assert 0.8 * inside_bytes(1) < more < inside_bytes(1)


def test_each_document_of_a_row_takes_its_part_of_a_card() -> None:
    more = beyond_reserved("cuda", 100) - beyond_reserved("cuda", 1)
    assert more == inside_bytes(100) - inside_bytes(1) > 10 << 20
    assert beyond_reserved("cpu", 100) == beyond_reserved("cpu", 1)


def llama_70b() -> Architecture:
    return Architecture(
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=False,
        )
    )


def test_a_70b_models_parts_are_those_of_the_design() -> None:
    own = replace(
        tiny_strategy.variant("shard", dtype="bfloat16", layer_inputs="host", lm_head="host"),
        size=StepSize(1, 2048, 8),
        lora=replace(tiny_strategy.SPEC.lora, r=16, lora_dropout=0.0),
        optim=OptimConfig(offload=True),
    )
    a = llama_70b()
    assert memory.layer_bytes(own, a) == pytest.approx(441.4e6, rel=1e-3)
    ranks = [memory.reserved_memory(rank) for rank in memory.reserve_ranks(own, a, "cuda", ROOMY)]
    for rank in ranks:
        assert rank.device[MemoryPart.FROZEN_LAYERS] == pytest.approx(80 * 441.4e6 / 2, rel=1e-3)
        assert rank.device[MemoryPart.EMBEDDING] == pytest.approx(2.1e9, rel=1e-2)
        assert rank.shared[MemoryPart.HOST_HEAD] == rank.device[MemoryPart.STREAMED_HEAD]
        assert rank.host[MemoryPart.LAYER_INPUTS] == pytest.approx(8 * 80 * 33.6e6, rel=1e-2)
        assert rank.host[MemoryPart.ADAPTER_MASTERS] == pytest.approx(4 * 207e6, rel=1e-2)
    own_bytes = sum(sum(rank.host.values()) for rank in ranks)
    assert memory.host_bytes(ranks, "cuda") == own_bytes + ranks[0].shared[MemoryPart.HOST_HEAD]


def test_cards_with_unequal_room_get_unequal_stages() -> None:
    own = spec("pipeline")
    a = architecture()
    even, _ = (memory.reserved_memory(rank) for rank in memory.reserve_ranks(own, a, "cuda", ROOMY))
    tight = [even.device_bytes * 2 // 3, 1 << 50]
    first, last = (
        memory.reserved_memory(rank) for rank in memory.reserve_ranks(own, a, "cuda", tight)
    )
    assert first.layers < even.layers
    assert first.layers + last.layers == LAYERS
    assert first.device_bytes <= tight[0]


def test_nothing_fake_is_left_behind() -> None:
    """Codes and weights that modules keep for later are made before, with real tensors."""
    own = spec("stream")
    frozen = tiny_strategy.base(dtype=own.dtype, quant=own.quant, **SHAPE)
    reserved = [
        memory.reserved_memory(rank)
        for rank in memory.reserve_ranks(own, frozen.architecture, "cpu", ROOMY)
    ]
    taken = workspace.with_workspace(reserved, own, frozen.architecture, "cpu")
    assert all(rank.device[MemoryPart.WORKSPACE] != 0 for rank in taken)
    assert not torch.distributed.is_initialized()
    strategy = tiny_strategy.build(own, frozen)
    assert tiny_strategy.apply(strategy, 0).loss > 0
