"""The full run of what is chosen: it corrects wrong lines and leaves right ones."""

from dataclasses import replace

import pytest
import tiny
import tiny_strategy
from tiny_rig import ROOMY, SPEC, A, chosen, rig

from fttrain.memory.parts import MemoryPart
from fttrain.model.decoder import Architecture
from fttrain.plan import confirm, memory, workspace
from fttrain.plan.choose import judge
from fttrain.plan.memory import RankMemory
from fttrain.plan.workspace import Workspaces
from fttrain.strategy.spec import StepSize, StrategySpec

ROOMS = [1 << 50] * 2


def taken(spec: StrategySpec, wrong_by: int = 0) -> list[RankMemory]:
    reserved = [
        memory.reserved_memory(rank) for rank in memory.reserve_ranks(spec, A, "cuda", ROOMS)
    ]
    found = workspace.with_workspace(reserved, spec, A, "cuda")
    return [
        replace(
            rank,
            device={
                **rank.device,
                MemoryPart.WORKSPACE: rank.device[MemoryPart.WORKSPACE] + wrong_by,
            },
        )
        for rank in found
    ]


def test_right_lines_stay() -> None:
    spec = replace(tiny_strategy.variant("pipeline"), size=StepSize(1, 64, 2))
    right = taken(spec)
    assert confirm.confirmed(right, spec, A, "cuda", ROOMS) == right


def test_wrong_lines_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    right = judge(SPEC, A, rig(ROOMY)).memory[0].device_bytes
    line = Workspaces.at
    monkeypatch.setattr(Workspaces, "at", lambda *where: line(*where) - right // 2)
    wrong = judge(SPEC, A, rig(ROOMY)).memory[0].device_bytes
    assert wrong < 0.6 * right
    best, *others = chosen(rig(ROOMY))
    assert best.confirmed
    assert not any(verdict.confirmed for verdict in others)
    same = next(v for v in [best, *others] if v.spec == SPEC)
    assert {same.memory[0].device_bytes} <= {wrong, right}
    whole = workspace.beyond_reserved(
        memory.reserve_ranks(best.spec, A, "cpu", [ROOMY])[0].context, "cuda"
    )
    assert best.memory[0].device[MemoryPart.WORKSPACE] == whole


def test_a_winner_that_does_not_fit_after_all_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = chosen(rig(ROOMY))
    fastest, needed = honest[0], honest[0].memory[0].device_bytes
    next_best = next(v for v in honest if v.memory[0].device_bytes < needed)
    line = Workspaces.at
    monkeypatch.setattr(Workspaces, "at", lambda *where: line(*where) - needed // 10)
    found = chosen(rig(needed - 1))
    refused = next(v for v in found if v.spec == fastest.spec)
    assert not refused.fits
    assert refused.missing_bytes == 1
    assert found[0].fits
    assert found[0].confirmed
    assert found[0].tokens_per_s <= next_best.tokens_per_s


def test_a_long_step_is_shortened_to_what_lines_start_from() -> None:
    long = replace(tiny_strategy.variant("stream"), size=StepSize(1, 64, 64))
    short = confirm._steps(long, 80, 1)
    assert short == workspace.evenly_from(long, 80, 1) == 2
    assert confirm._steps(long, 10, 1) == confirm.MOST_PASSES // 10
    assert confirm._steps(replace(long, size=StepSize(1, 64, 3)), 6, 1) == 3


def test_deep_models_are_run_in_all_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Architecture(tiny.model(num_hidden_layers=9).config)
    ran: list[int] = []
    real = workspace.beyond_reserved

    def counted(context, kind):  # type: ignore[no-untyped-def]
        ran.append(context.architecture.layers)
        return real(context, kind)

    reserved = [
        memory.reserved_memory(rank) for rank in memory.reserve_ranks(SPEC, deep, "cuda", ROOMS)
    ]
    lines = workspace.with_workspace(reserved, SPEC, deep, "cuda")
    monkeypatch.setattr(workspace, "beyond_reserved", counted)
    confirm.confirmed(lines, SPEC, deep, "cuda", ROOMS)
    assert ran == [9]  # both ranks are alike: one run
