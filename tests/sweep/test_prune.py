"""The median rule against Optuna's, and the curves that it looks at."""

import json
import random
from pathlib import Path

import optuna
import pytest

from fttrain.sweep.prune import curve, hopeless, share_done


@pytest.mark.parametrize("seed", range(4))
def test_it_prunes_what_optuna_would(seed: int) -> None:
    """Curves of trials of the same length, judged step by step as they come."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    draw, steps, least = random.Random(seed), 20, 3
    pruner = optuna.pruners.MedianPruner(n_startup_trials=least, n_warmup_steps=6)
    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    finished: list[list[tuple[float, float]]] = []
    pruned = 0
    for _ in range(12):
        trial, own, level = study.ask(), list[tuple[float, float]](), draw.uniform(2, 4)
        for step in range(1, steps + 1):
            value = level / step**0.5 + draw.gauss(0, 0.1)
            own.append((step / steps, value))
            trial.report(value, step)
            ours = hopeless(own, finished, least, 6 / steps)
            assert ours == trial.should_prune(), (seed, step)
            if ours:
                pruned += 1
                break
        else:
            finished.append(own)
            study.tell(trial, own[-1][1])
            continue
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert pruned
    assert len(finished) >= least


def test_trials_of_different_length_are_compared_by_their_share() -> None:
    long = [share_done([(step, 10.0 - step / 10) for step in range(1, 101)], 100)] * 3
    assert hopeless(share_done([(5, 6.0)], 10), long, 3, 0.0)  # half way the others had 5.0
    assert not hopeless(share_done([(5, 4.0)], 10), long, 3, 0.0)
    assert not hopeless(share_done([(5, 6.0)], 10), long, 4, 0.0)
    assert not hopeless(share_done([(5, 6.0)], 10), long, 3, 0.6)
    assert not hopeless([], long, 3, 0.0)


def test_what_is_looked_at(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in enumerate((4.0, None, 2.0), 1)]
    lines.append({"step": 3, "holdout_nll": 2.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve(tmp_path, evaluated=True) == [(3, 2.5)]
    assert curve(tmp_path, evaluated=False) == [(1, 4.0), (3, 3.0)]
    assert curve(tmp_path / "nothing", evaluated=False) == []
