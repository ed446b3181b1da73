"""Whole runs that run out of memory: what they say, leave, and go on with."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import short_memory
import torch
from tiny_run import Shortage, adapter, arguments, exit_codes, inputs, losses, two_ranks

from fttrain.cli import main
from fttrain.track import read_metrics

STEPS = 4
SEQ_LEN = 192  # documents are much shorter: rows are nearly full, and two never fit where one does
ONE_ROW = ("loop.micro_batch_size=1", "loop.gradient_accumulation_steps=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, and a data set."""
    return inputs(tmp_path_factory)


def run(folder: Path, output: Path, *more: str) -> int:
    """One rank, in this process: micro-batches of two rows, two of them in a step."""
    settings = (f"data.seq_len={SEQ_LEN}", f"loop.max_steps={STEPS}", "loop.samples=0")
    saving = ("checkpoint.every=2", "loop.eval_every=2")
    return main(arguments(folder, output, *settings, *saving, *more))


@pytest.fixture(scope="module")
def halved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that had memory for micro-batches of one row, and its stderr."""
    output, said = tmp_path_factory.mktemp("halved") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        short_memory.limit(patch, "backward", SEQ_LEN, layer=1)
        assert run(folder, output) == 0
    return output, said.getvalue()


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that began with micro-batches of one row."""
    output = tmp_path_factory.mktemp("small") / "run"
    assert run(folder, output, *ONE_ROW) == 0
    return output


def sizes(output: Path) -> list[int]:
    """Rows of a micro-batch in each step."""
    lines = read_metrics(output / "metrics.jsonl")
    return [line["micro_batch_size"] for line in lines if "loss" in line]


def same(one: Path, other: Path) -> bool:
    found, expected = adapter(one), adapter(other)
    return losses(one) == losses(other) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_it_goes_on_as_a_run_that_began_with_smaller_micro_batches(
    halved: tuple[Path, str], small: Path
) -> None:
    output, said = halved
    (line,) = [line for line in said.splitlines() if "ran out" in line]
    assert line.startswith("warning: step 1: rank 0 ran out of memory on cpu (tried to allocate")
    assert "; the largest parts: " in line
    assert f"goes on, with {' '.join(ONE_ROW)} (put them into the configuration" in line
    assert sizes(output) == [1] * STEPS
    assert same(output, small)


@pytest.mark.parametrize(
    ("now", "size"),
    [
        ((), 1),
        (("loop.halve_on_oom=false",), 2),
        (("loop.micro_batch_size=4", "loop.gradient_accumulation_steps=1"), 4),
    ],
)
def test_a_resumed_run_keeps_the_size_unless_the_user_says_otherwise(
    now: tuple[str, ...],
    size: int,
    folder: Path,
    halved: tuple[Path, str],
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is memory again by then."""
    output = tmp_path / "run"
    shutil.copytree(halved[0], output)
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
    assert run(folder, output, *now) == 0
    kept = f"with {' '.join(ONE_ROW)}, since memory ran out before with loop.micro_batch_size=2"
    assert (kept in capsys.readouterr().out) is (size == 1)
    assert sizes(output) == [1, 1, size, size]
    assert same(output, small) is (size == 1)


def test_evaluate_takes_the_size_that_the_run_had_come_to(
    folder: Path, halved: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as little memory as the run had; a size that the user gives is tried, and halved."""
    output = tmp_path / "run"
    shutil.copytree(halved[0], output)
    before = json.loads((output / "evaluation.json").read_text())
    two = ("loop.micro_batch_size=4", "loop.gradient_accumulation_steps=1")
    for more, told in (((), 0), (two, 2)):
        (output / "evaluation.json").unlink()
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            short_memory.limit(patch, "loss", SEQ_LEN)
            assert main(["evaluate", f"output={output}", *more]) == 0
        assert capsys.readouterr().err.count("warning: held-out rows: rank 0 ran out") == told
        again = json.loads((output / "evaluation.json").read_text())
        assert (again["base"], again["tuned"]) == (before["base"], before["tuned"])


def test_rows_that_two_does_not_divide_are_still_those_of_the_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six rows, three, one: a step never has more or fewer than it was configured to."""
    six = ("loop.micro_batch_size=6", "loop.gradient_accumulation_steps=1")
    with pytest.MonkeyPatch.context() as patch:
        short_memory.limit(patch, "backward", SEQ_LEN, layer=1)
        assert run(folder, tmp_path / "run", *six, "loop.max_steps=1") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "taken again" in line]
    for line, size, steps in zip(said, (3, 1), (2, 6), strict=True):
        assert f"loop.micro_batch_size={size} loop.gradient_accumulation_steps={steps} (" in line
    assert sizes(tmp_path / "run") == [1]


def test_switched_off_it_stops_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        short_memory.limit(patch, "backward", SEQ_LEN, layer=1)
        assert run(folder, tmp_path / "run", "loop.halve_on_oom=false") == 2
    said = capsys.readouterr()
    assert "taken again" not in said.err
    assert "rank 0 ran out of memory on cpu" in said.err
    assert "what frees most" in said.err


def test_one_row_that_does_not_fit_ends_all_ranks_with_the_reason(
    folder: Path, tmp_path: Path
) -> None:
    argv = arguments(folder, tmp_path / "run", "strategy=shard", "data.holdout=0")
    with two_ranks() as start:
        assert exit_codes(start(argv, Shortage(rank=1, tokens=0), stderr=tmp_path)) == [2, 2]
    for rank in range(2):
        said = (tmp_path / f"stderr{rank}").read_text()
        assert "rank 1 ran out of memory on cpu (tried to allocate" in said
        assert "; what frees most: " in said
        assert "Traceback" not in said
