"""Embedding and head in every place and form: what they take, and that strategies agree on them."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch
from ranks import run_ranks

from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.ledger import MemoryLedger
from fttrain.memory.parts import Location, MemoryPart
from fttrain.model.projection import QuantizedHead, ResidentHead
from fttrain.quant.config import QuantConfig
from fttrain.strategy.config import Placement
from fttrain.strategy.context import BuildContext
from fttrain.strategy.embedding_head import load_ends, reserve_ends
from fttrain.strategy.spec import StrategySpec

TABLE_BYTES, CODES_BYTES = 4 * 300 * 64, 215040  # as test_pipeline: what 4 bits take
EVERYWHERE = list(
    itertools.product(("llama", "llama_tied"), ("device", "host"), ("device", "host", "quantized"))
)


def context(spec: StrategySpec, model: str = "llama", device: str = "cpu") -> BuildContext:
    frozen, group = tiny_strategy.base(model), RankGroup(0, 1, 0, torch.device(device))
    return BuildContext(spec, group, frozen.architecture, frozen.frozen_format, MemoryLedger(group))


@pytest.mark.parametrize(("model", "embedding", "head"), EVERYWHERE)
def test_tables_are_booked_once_and_where_they_lie(model: str, embedding: str, head: str) -> None:
    built = context(tiny_strategy.variant(embedding=embedding, lm_head=head), model)
    reserve_ends(built, has_embedding=True, has_head=True)
    reserved = {r.part: r.size_bytes for r in built.ledger.reservations}
    tied = model == "llama_tied"
    one_table = tied and (embedding, head) in (("device", "device"), ("host", "host"))
    assert reserved.pop(MemoryPart.LOGITS) >= 300 * 128 * 8  # of 66 tokens, a multiple of 64
    on_host = embedding == "host"
    expected = {MemoryPart.HOST_EMBEDDING if on_host else MemoryPart.EMBEDDING: TABLE_BYTES}
    if head == "quantized":
        expected[MemoryPart.QUANTIZED_HEAD] = CODES_BYTES
        expected[MemoryPart.TABLE_STAGING] = TABLE_BYTES
    elif not one_table:
        expected[MemoryPart.HOST_HEAD if head == "host" else MemoryPart.HEAD] = TABLE_BYTES
    if head == "host":
        expected[MemoryPart.STREAMED_HEAD] = TABLE_BYTES
    assert reserved == expected
    table, projection = load_ends(built, tiny_strategy.base(model), True, True)
    assert isinstance(projection, QuantizedHead if head == "quantized" else ResidentHead)
    if isinstance(projection, ResidentHead):
        assert (projection.weight is table) == one_table


@pytest.mark.parametrize(
    ("embedding", "head", "loads"),
    [("host", "host", False), ("host", "quantized", True), ("device", "host", True)],
)
def test_a_card_is_filled_through_one_booked_table(embedding: str, head: str, loads: bool) -> None:
    built = context(tiny_strategy.variant(embedding=embedding, lm_head=head), device="cuda")
    reserve_ends(built, has_embedding=True, has_head=True)
    on_host = {
        r.part: r.size_bytes for r in built.ledger.reservations if r.location is Location.HOST
    }
    assert on_host == ({MemoryPart.TABLE_STAGING: TABLE_BYTES} if loads else {})


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        (QuantConfig("fp4", 32, False), QuantConfig("fp4", 32, False, "tile")),
        (QuantConfig("none", 32, False), QuantConfig("nf4", 32, True, "tile")),
    ],
)
def test_a_head_in_4_bits_is_quantised_as_the_layers(
    quant: QuantConfig, expected: QuantConfig
) -> None:
    spec = replace(tiny_strategy.SPEC, quant=quant, placement=Placement(lm_head="quantized"))
    _, projection = load_ends(context(spec), tiny_strategy.base(), True, True)
    assert isinstance(projection, QuantizedHead)
    assert projection.quant == expected


CASES: dict[str, dict[str, Any]] = {  # all with lm_head=quantized
    "replicate": {},
    "shard": {"strategy": "shard", "embedding": "host"},
    "stream": {"strategy": "stream", "group": 1, "embedding": "host"},
    "pipeline": {"strategy": "pipeline", "embedding": "host"},
}
MODELS = (("llama", "bfloat16"), ("llama_tied", "float32"))


def outcome(model: str, dtype: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All that is compared, on this rank."""
    spec = tiny_strategy.variant(dtype=dtype, lm_head="quantized", **settings)
    strategy = tiny_strategy.build(spec, tiny_strategy.base(model, dtype))
    stats, gradients = tiny_strategy.measure(strategy, 0)
    return {
        "gradients": gradients,
        "figures": [stats.loss, stats.grad_norm],
        "evaluated": tiny_strategy.evaluated(strategy),
        "answers": strategy.generate([[5, 9, 3], [7]], 4, stop={2}),
    }


def outcomes(names: list[str]) -> dict[Any, dict[str, Any]]:
    return {(n, model): outcome(*model, CASES[n]) for n in names for model in MODELS}


def test_strategies_agree_on_a_head_in_4_bits_to_the_bit() -> None:
    one, two = outcomes(["replicate"]), run_ranks(outcomes, 2, list(CASES))
    for model in MODELS:
        for rank, (name, settings) in itertools.product(two, CASES.items()):
            found = rank[name, model]
            expected = two[0]["replicate", model]
            if settings.get("strategy") == "pipeline":
                expected = one["replicate", model]
            for key in ("figures", "evaluated", "answers"):
                assert found[key] == expected[key], (name, model, key)
            assert found["gradients"]
            assert all(
                torch.equal(grad, expected["gradients"][of])
                for of, grad in found["gradients"].items()
            ), (name, model)


def test_a_head_in_4_bits_changes_what_is_learnt_by_what_4_bits_lose() -> None:
    """Its gradients are near those of the whole head, and not the same."""
    four_bits, whole = (
        tiny_strategy.measure(
            tiny_strategy.build(tiny_strategy.variant(lm_head=head), tiny_strategy.base()), 0
        )
        for head in ("quantized", "device")
    )
    assert four_bits[0].loss == pytest.approx(whole[0].loss, rel=0.02)
    assert four_bits[0].loss != whole[0].loss
    assert 1e-3 < tiny.difference(four_bits[1], whole[1]) < 0.3
