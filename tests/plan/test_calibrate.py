"""What a profile learns from real steps: what is left beside the GEMMs; and where a trial fails."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_strategy
import torch

from fttrain.config.run_config import compose, to_yaml
from fttrain.distributed.rank_group import RankGroup
from fttrain.model.decoder import Architecture
from fttrain.plan import memory, trial
from fttrain.plan.calibrate import calibrate, calibrated, python
from fttrain.plan.time import step_time
from fttrain.plan.trial import Trial
from fttrain.plan.workspace import with_layers
from fttrain.rig.profile import CardProfile, HostProfile, RigProfile
from fttrain.strategy.spec import StepSize, StrategySpec

CONFIG = tiny.model(num_hidden_layers=6).config
A = Architecture(CONFIG)
SPEC = replace(tiny_strategy.variant(), size=StepSize(2, 64, 3))
ALONE = RankGroup(0, 1, 0, torch.device("cpu"))
CARD = CardProfile("card", "cpu", 1 << 40, 1e9, 1e9, 1e30, overhead_bytes=7)
RIG = RigProfile("made up", (CARD,), HostProfile("cpu", 1, 1 << 40))


def planned_s(spec: StrategySpec, layers: int, card: CardProfile) -> float:
    a = Architecture(with_layers(CONFIG, layers))
    reserved = memory.reserve_ranks(spec, a, "cpu", [memory.ROOMY_BYTES])
    return step_time(reserved, replace(RIG, cards=(card,))).seconds


def test_a_plan_of_the_trials_own_steps_says_what_the_trial_measured() -> None:
    own = trial.trial_spec(SPEC)
    per_layer = planned_s(own, 4, CARD) - planned_s(own, 3, CARD)
    found = Trial(1.5 * per_layer / trial.MICRO_BATCHES, 0.25, overhead_bytes=1000)
    card = calibrated(CARD, found, SPEC, A)
    assert planned_s(own, 4, card) - planned_s(own, 3, card) == pytest.approx(1.5 * per_layer)
    whole_s = 4 * 1.5 * per_layer + trial.MICRO_BATCHES * 0.25
    assert planned_s(own, 4, card) == pytest.approx(whole_s)
    assert card.overhead_bytes == 1000


def test_steps_as_fast_as_their_gemms_have_nothing_beside_them() -> None:
    card = calibrated(CARD, Trial(1e-9, 0.0), SPEC, A)
    assert card == CARD
    found = calibrated(replace(CARD, others_bytes=3), Trial(1e-9, 0.0, None, 5), SPEC, A)
    assert found.beside_bytes == 7 + 5 + 3


def test_real_steps_of_a_small_model() -> None:
    """They take more than their GEMMs would at an endless rate, and memory beside tensors."""
    found = trial.run_trial(SPEC, CONFIG, torch.device("cpu"))
    assert found.layer_s > 0
    assert found.overhead_bytes is not None
    assert found.overhead_bytes > 50 << 20  # Python and torch alone


@pytest.mark.cuda
def test_what_a_card_holds_beside_tensors_is_something_and_not_much() -> None:
    """Steps load kernels, and the allocator takes 2 MiB at least; the host's bytes do not count."""
    device = torch.device("cuda", torch.cuda.current_device())
    config = with_layers(tiny.model(hidden_size=512).config, 2)
    found = trial.run_trial(replace(SPEC, dtype="bfloat16"), config, device)
    assert found.overhead_bytes is None
    assert found.allocator_bytes is not None
    assert 0 < found.allocator_bytes < 1 << 30


def test_a_trial_that_fails_leaves_the_card_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "config.yaml"
    settings.write_text(to_yaml(compose(["model=local", "model.path=/nowhere"])))
    command = python("fttrain.training.trial_rank", str(settings))
    assert calibrate(RIG, SPEC, A, ALONE, command) == RIG
    said = capsys.readouterr().err
    assert "rank 0: no real steps could be timed: " in said
    assert "/nowhere" in said


def test_what_the_process_tells_is_taken(tmp_path: Path) -> None:
    told = '{"layer_s": 1.0, "head_s": 2.0, "overhead_bytes": 3}'
    script = tmp_path / "told.py"
    script.write_text(f"import sys; open(sys.argv[1], 'w').write({told!r})")
    found = calibrate(RIG, SPEC, A, ALONE, ["python3", str(script)])
    assert found.cards == (calibrated(CARD, Trial(1.0, 2.0, 3), SPEC, A),)
