"""The choice among candidates, on made-up rigs that a tiny model just fits or does not."""

import io
import re
from dataclasses import replace

import pytest
import tiny_cpu_rig
from rich.console import Console
from rich.table import Table
from tiny_rig import ROOMY, SPEC, A, chosen, rig

from fttrain.memory.parts import MemoryPart
from fttrain.plan import memory
from fttrain.plan.choose import candidates, judge, room_bytes
from fttrain.plan.table import NOT_AT_ONCE, parts_table, table
from fttrain.rig.profile import RigProfile
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import StrategyConfig
from fttrain.strategy.spec import StepSize
from fttrain.util.units import gib

ONE_F_ONE_B = ScheduleConfig("all", "one_f_one_b")


def test_the_fastest_that_fits_comes_first() -> None:
    found = chosen(rig(ROOMY))
    assert all(verdict.fits for verdict in found)
    speeds = [verdict.tokens_per_s for verdict in found]
    assert speeds == sorted(speeds, reverse=True)
    assert found[0].spec.placement.activations == "keep"
    assert {verdict.spec.strategy.name for verdict in found} == {"replicate", "stream"}


def test_less_memory_leaves_less_of_the_model_on_the_card() -> None:
    whole = judge(SPEC, A, rig(ROOMY)).memory[0].device_bytes
    found = chosen(rig(whole - 1, copy=1e5))
    assert not next(v for v in found if v.spec == SPEC).fits
    assert found[0].fits
    assert found[0].spec.strategy.name == "stream"
    assert found[0].spec.strategy.resident_layers  # as many as there is room for
    assert all(v.memory[0].device_bytes < whole for v in found if v.fits)


def test_what_does_not_fit_says_what_is_missing() -> None:
    whole = judge(SPEC, A, rig(ROOMY)).memory[0].device_bytes
    verdict = judge(SPEC, A, rig(whole - 1000))
    assert verdict.missing_bytes == 1000
    assert verdict.reason.startswith("card 0: ")
    stream = replace(SPEC, strategy=replace(SPEC.strategy, name="stream"))
    needed = judge(stream, A, rig(ROOMY)).host_bytes
    assert judge(stream, A, rig(ROOMY, needed)).fits
    assert judge(stream, A, rig(ROOMY, needed - 1)).reason.startswith("host: ")


def test_ranks_of_a_cpu_share_the_host() -> None:
    """A stage may take more than its share where the other takes less; what is missing is the
    host's, said once.
    """
    pipeline = replace(SPEC, strategy=StrategyConfig("pipeline"), schedule=ONE_F_ONE_B)
    found = judge(pipeline, A, tiny_cpu_rig.rig(cards=2))
    needed = found.host_bytes + 2 * 1000
    assert max(own.device_bytes for own in found.memory) + 1000 > needed / 2
    model_slice = -(-needed // 2)
    assert judge(pipeline, A, tiny_cpu_rig.rig(cards=2, memory_bytes=model_slice)).fits
    short = judge(pipeline, A, tiny_cpu_rig.rig(cards=2, memory_bytes=model_slice - 500))
    assert short.missing_bytes == needed - 2 * (model_slice - 500)
    assert re.fullmatch(r"host: .* GiB of .* GiB: .* GiB, .* GiB, .* GiB", short.reason)


def test_nothing_fits_a_card_that_is_too_small() -> None:
    found = chosen(rig(100_000))
    assert not any(verdict.fits for verdict in found)
    missing = [verdict.missing_bytes for verdict in found]
    assert missing == sorted(missing)  # the nearest first
    assert all(missing)


def test_a_slow_link_changes_what_is_fastest() -> None:
    own = replace(SPEC, size=StepSize(1, 64, 2))

    def fastest(link: float, strategy: str) -> float:
        found = chosen(rig(ROOMY, host_bytes=1, cards=2, link=link), own)
        return max(v.tokens_per_s for v in found if v.spec.strategy.name == strategy)

    assert fastest(1e12, "shard") > fastest(1e12, "pipeline")  # no bubble
    assert fastest(1e5, "shard") < fastest(1e5, "pipeline")  # less to send


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_of_a_step_stay(world_size: int) -> None:
    own = replace(SPEC, size=StepSize(2, 64, 4))
    for candidate in candidates(own, world_size):
        size = candidate.size
        assert size.micro_batch_size * size.gradient_accumulation_steps == 8


def test_a_cards_room_is_without_its_overhead() -> None:
    card = replace(rig(1000).cards[0], overhead_bytes=400)
    assert room_bytes(card) == 600
    assert room_bytes(replace(card, allocator_bytes=100)) == 500


def test_what_tensors_cannot_have_is_lines_of_its_own() -> None:
    on = rig(ROOMY)
    cards = (replace(on.cards[0], overhead_bytes=1 << 30, allocator_bytes=2 << 30),)
    known = replace(on, cards=cards)
    verdict = judge(SPEC, A, known)
    shown = printed(parts_table(verdict, known))
    assert re.search(r"context, communication.* 1\.00 ", shown)
    assert re.search(r"allocator's rounding.* 2\.00 ", shown)
    assert re.search(r"together.* 3\.00 ", shown)  # and next to nothing
    assert "not measured" in printed(parts_table(verdict, on))


@pytest.mark.parametrize(("size_bytes", "at_once"), [(1 << 30, True), (-1 << 30, False)])
def test_reserved_parts_that_never_meet_have_a_row(size_bytes: int, at_once: bool) -> None:
    on = rig(ROOMY)
    verdict = judge(SPEC, A, on)
    (rank,) = verdict.memory
    other = replace(rank, device={**rank.device, MemoryPart.WORKSPACE: size_bytes})
    shown = printed(parts_table(replace(verdict, memory=(other,)), on))
    rows = {line.split("│")[1].strip() for line in shown.splitlines() if "│" in line}
    assert (MemoryPart.WORKSPACE.label in rows, NOT_AT_ONCE in rows) == (at_once, not at_once)


def unequal(needed_bytes: int) -> RigProfile:
    """A card that has just that, and one with all that anybody wants."""
    pair = rig(ROOMY, cards=2)
    small = replace(pair.cards[0], name="small card", memory_bytes=needed_bytes)
    return replace(pair, cards=(small, replace(pair.cards[1], name="large card")))


def printed(shown: Table) -> str:
    console = Console(width=150, file=io.StringIO())
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_smaller_card_keeps_fewer_layers_of_a_stream() -> None:
    stream = replace(SPEC, strategy=StrategyConfig("stream"))
    needed = judge(stream, A, rig(ROOMY, cards=2)).memory[0]
    room = 2 * memory.layer_bytes(stream, A)
    cards = unequal(max(needed.device_bytes, needed.reserved_device_bytes) + room)
    found = chosen(cards)
    kept = next(v for v in found if v.spec.strategy.resident_layers == (2, 6))
    assert kept.fits
    assert kept.memory[0].device_bytes <= cards.cards[0].memory_bytes
    assert "strategy.resident_layers=[2,6]" in kept.settings
    told = printed(table(found, cards, None))
    assert "1 x small card, 1 x large card" in told
    assert "[2, 6] resident" in " ".join(printed(table([kept], cards, None)).split())
    both = printed(parts_table(kept, cards))
    assert f"{gib(kept.memory[0].device[MemoryPart.FROZEN_LAYERS])}".split()[0] in both
    assert "card 0" in both
    assert "card 1" in both


def test_a_smaller_card_has_a_shorter_stage() -> None:
    pipeline = replace(SPEC, strategy=StrategyConfig("pipeline"), schedule=ONE_F_ONE_B)
    even = judge(pipeline, A, rig(ROOMY, cards=2)).memory
    cards = unequal(max(even[0].device_bytes, even[0].reserved_device_bytes) * 9 // 10)
    verdict = judge(pipeline, A, cards)
    assert verdict.fits
    first, last = verdict.memory
    assert first.layers < even[0].layers
    assert first.layers + last.layers == A.layers
    assert first.device_bytes <= cards.cards[0].memory_bytes
