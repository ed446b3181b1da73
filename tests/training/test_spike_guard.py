"""The guard is fed real shapes of trouble; signals are sent to a real process that is saving."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fttrain.config.loop_config import LoopConfig
from fttrain.training.spike_guard import MAX_SKIPPED, SpikeGuard
from fttrain.training.stop_signals import StopSignals
from fttrain.util.errors import UserError


def fed(guard: SpikeGuard, losses: list[float]) -> list[str]:
    return [guard.observe(loss).action for loss in losses]


def falling(steps: int, noise: float = 0.0) -> list[float]:
    """A loss curve from 4.5 towards 3 nats, with Gaussian noise."""
    dice = random.Random(0)
    return [3 + 1.5 * math.exp(-step / 30) + dice.gauss(0, noise) for step in range(steps)]


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 0.5])
def test_an_honest_curve_passes(noise: float) -> None:
    assert set(fed(SpikeGuard(), falling(2000, noise))) == {"ok"}


def test_a_steep_start_passes() -> None:
    assert set(fed(SpikeGuard(), [12.0, 11.0, 9.0, 7.0, 5.0, 4.0, 3.5, 3.2, 3.1, 3.0])) == {"ok"}


@pytest.mark.parametrize("rise", [2.0, 0.5])
def test_a_rise_stops_with_advice(rise: float) -> None:
    guard = SpikeGuard(rise=rise)
    assert set(fed(guard, [3.0] * 20)) == {"ok"}
    assert guard.observe(3.0 + rise - 0.01).action == "ok"
    verdict = guard.observe(guard.mean + rise)
    assert verdict.action == "stop"
    assert "over its running mean" in verdict.message
    assert "optim.lr" in verdict.message
    assert "quant=fp4" in verdict.message
    assert "\n" not in verdict.message


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_or_gradient_that_is_no_number_stops_at_once(bad: float) -> None:
    assert SpikeGuard().observe(bad).action == "stop"
    verdict = SpikeGuard().observe(3.0, grad_norm=bad)
    assert verdict.action == "stop"
    assert "gradient norm" in verdict.message


def test_a_slow_climb_stops() -> None:
    """0.05 nats a step never rises far over the running mean, and is a divergence all the same."""
    guard = SpikeGuard()
    actions = fed(guard, [3 + 0.05 * step for step in range(80)])
    assert actions[:40] == ["ok"] * 40
    assert "stop" in actions


def test_oscillation_stops() -> None:
    guard = SpikeGuard()
    assert set(fed(guard, [3.0] * 10)) == {"ok"}
    for step in range(12):
        verdict = guard.observe(3.0 + 1.2 * (step % 2))
        if verdict.action == "stop":
            break
    assert verdict.action == "stop"
    assert "oscillates between 3.000 and 4.200" in verdict.message


def test_skip_leaves_the_baseline_alone_and_ends_when_it_does_not_help() -> None:
    guard = SpikeGuard(policy="skip")
    fed(guard, [3.0] * 20)
    assert fed(guard, [9.0, math.nan, 3.0, 9.0]) == ["skip", "skip", "ok", "skip"]
    assert guard.mean == pytest.approx(3.0)
    assert guard.observe(3.0).action == "ok"
    actions = fed(guard, [9.0] * MAX_SKIPPED)
    assert actions == ["skip"] * (MAX_SKIPPED - 1) + ["stop"]


def test_ignore_says_it_once_and_goes_on() -> None:
    guard = SpikeGuard(policy="ignore")
    fed(guard, [3.0] * 20)
    verdicts = [guard.observe(math.nan) for _ in range(3)]
    assert [verdict.action for verdict in verdicts] == ["ok"] * 3
    assert ["going on" in verdict.message for verdict in verdicts] == [True, False, False]


def test_a_restored_guard_decides_the_same_for_ever_after() -> None:
    dice = random.Random(1)
    losses = [dice.choice([3.0, 3.4, 4.6, 5.5, 2.0, math.nan]) for _ in range(400)]
    whole, half = SpikeGuard(policy="skip"), SpikeGuard(policy="skip")
    before = [whole.observe(loss) for loss in losses[:200]]
    assert before == [half.observe(loss) for loss in losses[:200]]
    resumed = SpikeGuard(policy="skip")
    resumed.restore(json.loads(json.dumps(half.state(), allow_nan=False)))
    assert resumed == half
    after = [whole.observe(loss) for loss in losses[200:]]
    assert after == [resumed.observe(loss) for loss in losses[200:]]
    assert {verdict.action for verdict in before + after} >= {"ok", "skip"}
    fresh = SpikeGuard()
    fresh.restore(json.loads(json.dumps(SpikeGuard().state(), allow_nan=False)))
    assert fresh == SpikeGuard()


SAVING = """
import sys, time
from pathlib import Path
from fttrain.training.stop_signals import StopSignals
folder = Path(sys.argv[1])
with StopSignals() as stop:
    print("training", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    with (folder / "save").open("w") as file:
        for part in range(30):
            file.write(f"{part} ")
            file.flush()
            time.sleep(0.02)
    print("saved", flush=True)
sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGINT, 143)],
    ids=["SIGINT", "SIGTERM"],
)
def test_no_signal_breaks_a_save(
    first: signal.Signals, second: signal.Signals, code: int, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "training\n"
        process.send_signal(first)
        assert process.stdout.readline() == "saving\n"
        process.send_signal(second)
        process.send_signal(second)
        assert process.stdout.readline() == "saved\n"
        told = process.stderr.read()
    assert process.returncode == code
    assert (tmp_path / "save").read_text().split() == [str(part) for part in range(30)]
    assert f"{first.name}: finishing this step" in told
    assert f"kill -9 {process.pid}" in told


def test_handlers_come_back_and_silence_means_success() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as stop:
        assert (stop.requested, stop.signum, stop.exit_code) == (False, None, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.requested, stop.signum, stop.exit_code) == (True, signal.SIGTERM, 143)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 0),
        ("epochs", 0.0),
        ("epochs", math.nan),
        ("micro_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("seed", -1),
        ("eval_every", -1),
        ("log_every", 0),
        ("samples", -1),
        ("spike_policy", "panic"),
        ("spike_rise", 0.0),
    ],
)
def test_the_settings_name_the_bad_key(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"loop\.{key}={value}"):
        LoopConfig(**{key: value})  # type: ignore[arg-type]
