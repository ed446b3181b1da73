"""What is left open becomes what ``choose`` and ``judge`` rank first."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_cpu_rig
import tiny_strategy

from fttrain.model.decoder import Architecture
from fttrain.plan import auto
from fttrain.plan.auto import PlanRequest, check_fits, choose_plan, ranked
from fttrain.plan.choose import Candidate, candidates, choose, judge
from fttrain.rig.profile import RigProfile
from fttrain.strategy.config import POLICIES
from fttrain.strategy.spec import StepSize, StrategySpec
from fttrain.util.errors import UserError

A = Architecture(tiny.model(num_hidden_layers=4).config)
SPEC = replace(tiny_strategy.variant(), size=StepSize(1, 64, 1))
# Of its own accord the planner tries neither 3 resident layers nor 3 slots.
STREAM = replace(
    tiny_strategy.variant(strategy="stream", resident_layers=3, slots=3), size=SPEC.size
)


def silent(done: int, total: int) -> None:
    """Nobody watches."""


def request(
    *left_open: str, spec: StrategySpec = SPEC, rig: RigProfile | None = None
) -> PlanRequest:
    return PlanRequest("tiny", spec, A, rig or tiny_cpu_rig.rig(), left_open, 2)


def settings(verdicts: list[Candidate]) -> list[str]:
    return [verdict.settings for verdict in verdicts]


def test_strategy_alone_is_the_best_of_those_with_the_activations_that_are_given() -> None:
    chosen = choose(list(candidates(SPEC, 1)), A, tiny_cpu_rig.rig(), silent)
    assert settings(ranked(request("strategy", "activations"), silent)) == settings(chosen)
    allowed = [v for v in chosen if v.spec.placement.activations == "recompute"]
    assert settings(ranked(request("strategy"), silent)) == settings(allowed)
    assert chosen[0] is not allowed[0]
    assert len(allowed) > 1


def test_activations_alone_leave_strategy_and_rows_as_they_are() -> None:
    found = ranked(request("activations", spec=STREAM), silent)
    assert {v.spec.placement.activations for v in found} == set(POLICIES)
    for verdict in found:
        assert replace(verdict.spec, placement=STREAM.placement) == STREAM
        assert verdict.time == judge(verdict.spec, A, tiny_cpu_rig.rig()).time
    rates = [verdict.tokens_per_s for verdict in found]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]


def test_what_is_fastest_gives_way_to_what_fits() -> None:
    found = ranked(request("activations", spec=STREAM), silent)
    peaks = {v.spec.placement.activations: v.host_bytes + 1000 for v in found}
    assert found[0].spec.placement.activations == "keep"
    assert peaks["recompute"] < peaks["keep"]
    short = tiny_cpu_rig.rig(memory_bytes=peaks["recompute"])
    again = ranked(request("activations", spec=STREAM, rig=short), silent)
    assert again[0].spec.placement.activations == "recompute"
    assert [verdict.fits for verdict in again] == [True, False, False]


def test_nothing_fits() -> None:
    wanted = request("activations", spec=STREAM, rig=tiny_cpu_rig.rig(memory_bytes=10_000))
    found = ranked(wanted, silent)
    assert not any(verdict.fits for verdict in found)
    assert found[0].missing_bytes == min(verdict.missing_bytes for verdict in found)


def test_a_plan_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = request("activations", spec=STREAM)
    found = choose_plan(wanted, str(tmp_path), silent)
    best = ranked(wanted, silent)[0]
    assert found.settings["activations"] == best.spec.placement.activations
    assert found.settings["strategy"]["resident_layers"] == 3
    assert found.plan["ran"] == best.settings
    assert best.settings in found.summary

    def planned_again(*_: object) -> None:
        raise UserError("planned again")

    for name in ("choose", "judge"):
        monkeypatch.setattr(auto, name, planned_again)
    assert choose_plan(wanted, str(tmp_path), silent) == found
    published = tiny.model(num_hidden_layers=4).config  # with what a shipped config.json lacks
    published.bos_token_id, published.architectures = 7, ["LlamaForCausalLM"]
    same = replace(wanted, architecture=Architecture(published))
    assert choose_plan(same, str(tmp_path), silent) == found
    others = {
        "rig": replace(wanted, rig=tiny_cpu_rig.rig(sums_bytes_per_s=1e8)),
        "rows": replace(wanted, spec=replace(STREAM, size=StepSize(2, 64, 1))),
        "model": replace(wanted, architecture=Architecture(tiny.model(num_hidden_layers=5).config)),
        "nothing open": replace(wanted, left_open=()),
    }
    for other in others.values():
        with pytest.raises(UserError, match="planned again"):
            choose_plan(other, str(tmp_path), silent)


@pytest.mark.parametrize("overhead_bytes", [1000, None])
def test_what_is_predicted_stands_in_the_plan(tmp_path: Path, overhead_bytes: int | None) -> None:
    rig = tiny_cpu_rig.rig(overhead_bytes=overhead_bytes)
    found = choose_plan(request(spec=STREAM, rig=rig), str(tmp_path), silent)
    check_fits(request(), found)
    verdict = judge(STREAM, A, rig)
    assert verdict.time is not None
    expected = {"step_s": verdict.time.seconds, "tokens_per_s": verdict.tokens_per_s}
    if overhead_bytes is not None:  # on a CPU all of it is the process's memory
        expected["peak_host_bytes"] = verdict.host_bytes + overhead_bytes
    (ours,) = found.plan["candidates"]
    assert ours["predicted"] == expected
