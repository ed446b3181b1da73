"""A dry run: exactly the examples that were asked for, an estimate, and nothing left behind."""

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import arguments, exit_codes, inputs, two_ranks

from fttrain.checkpoint.output_lock import lock_output
from fttrain.cli import main
from fttrain.config.run_config import compose
from fttrain.data.batch import MicroBatch
from fttrain.plan.rigs import find_rig
from fttrain.strategy.data_parallel import DataParallel
from fttrain.training import dry_run
from fttrain.training.dry_run import DryRunResult, TimeEstimate, advice, estimate, rents, warnings

HOUR_S = 3600.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_exactly_n_examples_pass_and_nothing_stays(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Into the folder of another run that is under way: it is neither read nor touched."""
    passed: list[list[MicroBatch]] = []
    step = DataParallel.train_step

    def counted(self: DataParallel, batches: list[MicroBatch], *rest: Any) -> Any:
        passed.append(batches)
        return step(self, batches, *rest)

    monkeypatch.setattr(DataParallel, "train_step", counted)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 1}\n')
    with lock_output(output, "auto"):
        before = files(tmp_path)
        more = ("dry_run=23", "loop.epochs=3", "resume=none", "track=wandb", "track.mode=offline")
        assert main(arguments(folder, output, *more)) == 0
        assert files(tmp_path) == before
    warm_up, *measured = passed
    assert sum(len(batch.lengths) for batches in measured for batch in batches) == 23
    assert [batch.lengths for batch in warm_up] == [batch.lengths for batch in measured[0]]
    tokens = sum(len(batch.input_ids) for batches in measured for batch in batches)
    said = capsys.readouterr().out
    assert f"23 examples, {tokens:,} tokens in" in said
    assert re.search(r"estimate: \d+\.\d\d hours \(.+\) for \d+ steps, 3\.00 epochs of", said)
    assert f"step {len(passed)}/{len(passed)}" in said, "progress"


def test_two_ranks_share_the_examples(folder: Path, tmp_path: Path) -> None:
    with two_ranks() as start:
        argv = arguments(folder, tmp_path / "run", "dry_run=10", "strategy=shard")
        assert exit_codes(start(argv)) == [0, 0]
    assert not list(tmp_path.iterdir())


def test_more_examples_than_there_are_and_fewer_than_a_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "run", "dry_run=1000")) == 0
    assert "54 examples," in capsys.readouterr().out  # of 60, a tenth is held out
    assert main(arguments(folder, tmp_path / "run", "dry_run=1")) == 0
    said = capsys.readouterr().err
    assert "warning: 1 examples do not fill one step of 4 rows" in said
    assert re.search(r"dry_run=\d+ fills two", said)


def test_the_estimate_is_tokens_over_rate() -> None:
    trial = DryRunResult(examples=50, tokens=30_000, seconds=15.0)
    assert trial.tokens_per_s == 2000
    found = estimate(trial, epoch_tokens=36_000_000, epochs=2.5)
    assert found == TimeEstimate(epoch_s=5 * HOUR_S, run_s=12.5 * HOUR_S)


@pytest.mark.parametrize(
    ("epoch_h", "run_h", "text"),
    [
        (6, 12, ""),
        (6, 12.5, "the run takes 12.5 hours, more than 12"),
        (6.5, 6.5, "an epoch takes 6.5 hours, more than 6"),
        (7, 14, "the run takes 14.0 hours, more than 12; an epoch takes 7.0 hours"),
    ],
)
def test_it_warns_where_it_takes_long(epoch_h: float, run_h: float, text: str) -> None:
    lines = warnings(TimeEstimate(epoch_h * HOUR_S, run_h * HOUR_S), ["this", "that"])
    if not text:
        assert lines == []
        return
    (line,) = lines
    assert text in line
    assert line.endswith("what helps: this; that")


def test_a_long_run_says_what_renting_would_cost() -> None:
    each = find_rig("2x3090_nvlink").cards[0].price_per_h
    assert each
    (line,) = rents(["NVIDIA GeForce RTX 3090"] * 2, 20.0)
    assert f"2 x NVIDIA GeForce RTX 3090 for 20.0 hours: ${40 * each:.2f}" in line
    found = TimeEstimate(7 * HOUR_S, 20 * HOUR_S)
    assert warnings(found, ["this"], [line])[1:] == [line]
    assert warnings(TimeEstimate(HOUR_S, HOUR_S), ["this"], [line]) == []
    for cards in ([], ["a card that nobody rents out"]):  # prices, but no made-up speed
        *known, last = rents(cards, 20.0)
        assert any(f"2 x NVIDIA GeForce RTX 3090: ${2 * each:.2f} an hour" in one for one in known)
        assert any("2 x NVIDIA GeForce RTX 4090: $" in one for one in known)
        assert "20.0 hours" not in " ".join(known)
        assert "fttrain plan" in last


def test_what_helps_depends_on_the_run() -> None:
    plain = " ".join(advice(compose(["lora.r=8"]), 0.0))
    assert "lora.r" not in plain
    assert "another strategy" not in plain
    assert "activations=keep" in plain
    assert "data.max_rows" in plain
    settings = ["strategy=stream", "lora.r=64", "data.packing=false", "activations=keep"]
    other = " ".join(advice(compose([*settings, "loop.epochs=3"]), 0.4))
    assert "40% of the time goes into waiting for what strategy=stream moves" in other
    for part in ("lora.r=64", "data.packing=true", "loop.epochs=3"):
        assert part in other
    assert "activations" not in other


@pytest.mark.parametrize("waiting", [0.0, 0.4])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            ["strategy=deepspeed", "quant=none", "lora=none"], marks=pytest.mark.deepspeed
        ),
        pytest.param(["strategy=deepspeed"], marks=pytest.mark.deepspeed),
        ["strategy=pipeline", "schedule=one_f_one_b"],
        ["strategy=shard", "layer_inputs=host"],
    ],
)
def test_what_helps_is_allowed(settings: list[str], waiting: float) -> None:
    """Each advice that names settings is taken, over those of the run."""
    helps = advice(compose([*settings, "data.packing=false", "loop.epochs=3"]), waiting)
    taken = 0
    for one in helps:
        named = re.findall(r"[\w.]+=[\w.]+", one)
        for values in (named, [text.replace("keep", "offload") for text in named]):
            if values == named or " or offload" in one:
                compose([*settings, *values])
                taken += bool(values)
    assert taken >= 2
    whole_weights = "lora=none" in settings
    assert ("replicate" in " ".join(helps)) == (waiting == 0 and not whole_weights)
    assert ("another strategy" in " ".join(helps)) == (waiting > 0 and not whole_weights)


def test_a_negative_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dry_run=-1"]) == 2
    assert "dry_run=-1: a number of examples such as 50" in capsys.readouterr().err


def test_the_first_step_counts_for_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """A first step that takes half a minute by the clock does not change the rate."""
    clock = [0.0]
    step = dry_run.take_step

    def slow_at_first(run: Any, lr: float) -> Any:
        result = step(run, lr)
        clock[0] += 1.0 if clock[0] else 30.0
        return result

    monkeypatch.setattr(dry_run, "take_step", slow_at_first)
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock[0])
    assert main(arguments(folder, tmp_path / "run", "dry_run=20")) == 0
    said = capsys.readouterr().out
    steps = int(re.search(r"in (\d+) step\(s\), after one to warm up", said)[1])  # type: ignore[index]
    assert f" tokens in {steps:.1f} s:" in said
