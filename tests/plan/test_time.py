"""Seconds of a step on a made-up rig, where every figure is reckoned by hand."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_strategy

from fttrain.model.decoder import Architecture
from fttrain.plan import memory
from fttrain.plan.time import StepTime, step_time, update_bytes
from fttrain.plan.work import head_flops, layer_values, layer_work, weight_bytes
from fttrain.rig.profile import (
    CardProfile,
    CopyRates,
    HostProfile,
    LinkProfile,
    LinkSample,
    RigProfile,
)
from fttrain.strategy import trainable_state
from fttrain.strategy.spec import StepSize, StrategySpec
from fttrain.util.errors import UserError

LAYERS, ROWS, SEQ_LEN, ACCUMULATION = 6, 2, 64, 4
TOKENS = ROWS * SEQ_LEN
FAST = 1e30  # takes no time
A = Architecture(tiny.model(num_hidden_layers=LAYERS).config)


def rig(
    gemm: float = FAST, link: float = FAST, copy: float = FAST, dequantise: float = FAST
) -> RigProfile:
    """Two cards that differ from infinitely fast ones in what is given, bytes or FLOP a second."""
    card = CardProfile(
        "card", "cuda", 24 << 30, gemm, dequantise, FAST, CopyRates(copy), CopyRates(FAST)
    )
    samples = {
        name: (LinkSample(1, 1 / link), LinkSample(10**9, 1e9 / link))
        for name in ("all_reduce", "all_gather", "send_recv")
    }
    host = HostProfile("cpu", 8, 64 << 30, adamw_values_per_s=FAST)
    return RigProfile("made up", (card, card), host, (LinkProfile("default", "?", 2, samples),))


def spec(strategy: str, group: Any = "all", **changes: Any) -> StrategySpec:
    made = tiny_strategy.variant(strategy, group, **changes)
    return replace(made, size=StepSize(ROWS, SEQ_LEN, ACCUMULATION))


def timed(own: StrategySpec, on: RigProfile) -> StepTime:
    return step_time(memory.reserve_ranks(own, A, "cuda", [1 << 50] * len(on.cards)), on)


def flops(policy: str = "recompute") -> float:
    """Of a rank's step."""
    work = layer_work(A, tiny_strategy.SPEC.lora, policy, SEQ_LEN)
    layers = LAYERS * (work.forward + work.backward)
    return ACCUMULATION * TOKENS * (layers + head_flops(A))


@pytest.mark.parametrize("strategy", ["replicate", "pipeline"])
def test_only_targets_have_logits(strategy: str) -> None:
    own = spec(strategy)
    quarter = replace(own, size=replace(own.size, target_share=0.25))
    found = [timed(each, rig(gemm=1e9)).seconds for each in (own, quarter)]
    on_rank = ACCUMULATION * TOKENS * (2 if strategy == "pipeline" else 1)
    assert found[0] - found[1] == pytest.approx(0.75 * on_rank * head_flops(A) / 1e9)


@pytest.mark.parametrize("strategy", ["replicate", "shard", "stream"])
def test_compute_alone(strategy: str) -> None:
    found = timed(spec(strategy), rig(gemm=1e9))
    assert found.seconds == pytest.approx(flops() / 1e9)
    assert found.tokens_per_s == pytest.approx(2 * ACCUMULATION * TOKENS / found.seconds)
    assert found.limit == "compute"
    kept = timed(spec(strategy, activations="keep"), rig(gemm=1e9))
    assert kept.seconds == pytest.approx(flops("keep") / 1e9)


@pytest.mark.parametrize(("group", "passes"), [("all", 2), (1, 8), (3, 4)])
def test_a_shard_moves_all_but_what_lies_in_its_slots(group: Any, passes: int) -> None:
    own = spec("shard", group)
    context = memory.reserve_ranks(own, A, "cuda", [1 << 50] * 2)[0].context
    moved_bytes = passes * (LAYERS - 2) * context.layer_bytes
    sums_bytes = (
        (LAYERS + 1) * 4 * trainable_state.layout_of(context).values
    )  # the last one is not hidden
    assert timed(own, rig(link=1e6)).seconds == pytest.approx((moved_bytes + sums_bytes) / 1e6)
    assert timed(own, rig(link=1e6)).limit == "link"


def test_a_stream_copies_what_is_not_resident() -> None:
    own = spec("stream", resident_layers=3)
    layer_bytes = memory.layer_bytes(own, A)
    assert timed(own, rig(copy=1e6)).seconds == pytest.approx(2 * 1 * layer_bytes / 1e6)


def test_what_is_slower_hides_the_other() -> None:
    own = spec("stream")
    copied_s = 2 * (LAYERS - 2) * memory.layer_bytes(own, A) / 1e6
    computed_s, head_s = flops() / 1e9, ACCUMULATION * TOKENS * head_flops(A) / 1e9
    both = timed(own, rig(gemm=1e9, copy=1e6)).seconds
    assert max(copied_s, computed_s) < both < copied_s + computed_s
    work = layer_work(A, own.lora, "recompute", SEQ_LEN)
    passes = [ACCUMULATION * TOKENS * LAYERS * f / 1e9 for f in (work.forward, work.backward)]
    assert both == pytest.approx(sum(max(s, copied_s / 2) for s in passes) + head_s)


@pytest.mark.parametrize(("group", "times"), [("all", 2), (1, 2 * ACCUMULATION)])
def test_a_layer_is_dequantised_once_a_pass(group: Any, times: int) -> None:
    own = spec("replicate", group)
    context = memory.reserve_ranks(own, A, "cuda", [1 << 50] * 2)[0].context
    made_bytes = times * LAYERS * weight_bytes(context)
    assert timed(own, rig(dequantise=1e6)).seconds == pytest.approx(made_bytes / 1e6)


def test_a_pipeline_fills_and_empties() -> None:
    own = spec("pipeline")
    work = layer_work(A, own.lora, "recompute", SEQ_LEN)
    first = TOKENS * LAYERS / 2 * (work.forward + work.backward)
    last = first + TOKENS * head_flops(A)
    expected = (2 * ACCUMULATION * last + first) / 1e9
    assert timed(own, rig(gemm=1e9)).seconds == pytest.approx(expected)


def test_a_rate_that_is_missing_is_named() -> None:
    known = rig()
    cards = tuple(replace(card, gemm_flop_per_s=None) for card in known.cards)
    with pytest.raises(UserError, match=r"made up: cards\.gemm_flop_per_s"):
        timed(spec("replicate"), replace(known, cards=cards))
    with pytest.raises(UserError, match="no link"):
        timed(spec("shard"), replace(known, links=()))


def test_a_cpu_computes_sends_and_copies_one_after_the_other() -> None:
    none = CopyRates()  # of a CPU nothing is measured: it is all its own memory
    card = replace(
        rig(gemm=1e9).cards[0], kind="cpu", memory_bytes_per_s=1e6, to_card=none, to_host=none
    )
    sent = {
        name: (LinkSample(1, 1 / 1e8, 1 / 4e8), LinkSample(10**9, 1e9 / 1e8, 1e9 / 4e8))
        for name in ("all_reduce", "all_gather", "send_recv")
    }
    on = replace(rig(gemm=1e9), cards=(card, card), links=(LinkProfile("gloo", "TCP", 2, sent),))
    own = spec("shard")
    context = memory.reserve_ranks(own, A, "cpu", [1 << 50] * 2)[0].context
    gathered_s = 2 * (LAYERS - 2) * context.layer_bytes / 1e8
    sum_s = 4 * trainable_state.layout_of(context).values / 1e8
    cores_s = (gathered_s + LAYERS * sum_s) / 4
    adapters_s = update_bytes(context) * LAYERS / 1e6
    found = step_time(memory.reserve_ranks(own, A, "cpu", [1 << 50] * 2), on)
    assert found.seconds == pytest.approx(flops() / 1e9 + cores_s + sum_s + adapters_s)
    assert found.limit == "compute"
    host = spec("stream")
    copied_s = 2 * (LAYERS - 2) * context.layer_bytes / 1e6
    found = step_time(memory.reserve_ranks(host, A, "cpu", [1 << 50] * 2), on)
    cores_s = copied_s + LAYERS * sum_s / 4
    assert found.seconds == pytest.approx(flops() / 1e9 + cores_s + sum_s + adapters_s)


@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_what_is_no_gemm_takes_as_long_as_real_steps_say(activations: str) -> None:
    known = rig(gemm=1e9)
    cards = (replace(known.cards[0], layer_values_per_s=1e6, head_flop_per_s=1e8),) * 2
    own = spec("replicate", activations=activations)
    tokens = ACCUMULATION * TOKENS
    more_s = tokens * LAYERS * layer_values(A) / 1e6
    more_s += tokens * head_flops(A) * (1 / 1e8 - 1 / 1e9)
    found = timed(own, replace(known, cards=cards)).seconds
    assert found == pytest.approx(timed(own, known).seconds + more_s)
