"""Seconds of a step over each link, on a made-up rig where nothing but the link takes time."""

from dataclasses import replace

import pytest
import tiny
import tiny_strategy

from fttrain.model.decoder import Architecture
from fttrain.plan import memory
from fttrain.plan.links import step_table, steps
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

LAYERS, FAST = 6, 1e30
A = Architecture(tiny.model(num_hidden_layers=LAYERS).config)
PLACES = ("default", "no_p2p", "sockets")


def link(transport: str, rate: float, *collectives: str, wrong: str = "") -> LinkProfile:
    named = collectives or ("all_reduce", "all_gather", "send_recv")
    samples = {name: (LinkSample(1, 1 / rate), LinkSample(10**9, 1e9 / rate)) for name in named}
    return LinkProfile(transport, f"{transport}'s wire", 2, samples, wrong)


def rig(memory_bytes: int = 24 << 30) -> RigProfile:
    card = CardProfile(
        "card", "cuda", memory_bytes, FAST, FAST, FAST, CopyRates(FAST), CopyRates(FAST)
    )
    links = (
        link("default", 4e6),
        link("no_p2p", 1e6),
        link("sockets", 2e6, "all_reduce"),
        link("gloo", FAST, wrong="rank 1: a byte differs"),
    )
    return RigProfile("made up", (card, card), HostProfile("cpu", 8, 64 << 30), links)


def spec(strategy: str, **changes: object) -> StrategySpec:
    return replace(tiny_strategy.variant(strategy, **changes), size=StepSize(2, 64, 4))


def test_each_link_takes_what_it_takes_by_hand() -> None:
    own = spec("shard")
    shard, replicate, pipeline = steps(own, A, rig(), rig().links[:3])
    assert [one.strategy for one in (shard, replicate, pipeline)] == [
        "shard",
        "replicate",
        "pipeline",
    ]
    context = memory.reserve_ranks(own, A, "cuda", [1 << 50] * 2)[0].context
    sums_bytes = (
        (LAYERS + 1) * 4 * trainable_state.layout_of(context).values
    )  # the last one is not hidden
    gathered_bytes = 2 * (LAYERS - 2) * context.layer_bytes  # forward and back, but for two slots
    assert replicate.seconds == pytest.approx([sums_bytes / rate for rate in (4e6, 1e6, 2e6)])
    by_hand = [(sums_bytes + gathered_bytes) / rate for rate in (4e6, 1e6)]
    assert shard.seconds[:2] == pytest.approx(by_hand)
    assert shard.seconds[2] is None, "sockets gather nothing"
    assert pipeline.seconds[1] == pytest.approx(4 * (pipeline.seconds[0] or 0))
    assert all(one.fits for one in (shard, replicate, pipeline))


def test_the_table_says_what_the_usual_link_saves() -> None:
    table = step_table(spec("shard"), A, rig())
    assert table is not None
    assert list(table.columns[1:]) == list(PLACES), "a link that is wrong has no time"
    assert table.rows[0][0] == "strategy=shard"
    assert table.rows[0][3] == "-"
    assert (
        "default (default's wire) saves 75.0% of a step of strategy=shard beside no_p2p "
        "(no_p2p's wire)."
    ) in table.below
    assert "saves 50.0% of a step of strategy=replicate beside sockets" in table.below


def test_what_does_not_fit_is_said_and_saves_nothing() -> None:
    own = spec("shard")
    held = [
        memory.reserved_memory(
            memory.reserve_ranks(spec(name), A, "cuda", [1 << 50] * 2)[0]
        ).reserved_device_bytes
        for name in ("shard", "replicate")
    ]
    table = step_table(own, A, rig(sum(held) // 2))
    assert table is not None
    assert [row[0] for row in table.rows[:2]] == [
        "strategy=shard",
        "strategy=replicate (does not fit)",
    ]
    assert "strategy=replicate beside" not in table.below


def test_what_cannot_be_is_left_out() -> None:
    sharded = spec("shard", shard=True)
    assert [one.strategy for one in steps(sharded, A, rig(), rig().links)] == ["shard", "replicate"]
    assert step_table(spec("shard"), A, replace(rig(), links=rig().links[3:])) is None
    assert step_table(spec("shard"), A, replace(rig(), links=())) is None
