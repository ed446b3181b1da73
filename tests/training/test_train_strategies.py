"""Whole runs under every strategy: the same losses, moved to other ranks, a damaged cache."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import tiny_files
from tiny_run import adapter, arguments, exit_codes, losses, two_ranks

from fttrain.cli import main
from fttrain.track import read_metrics

STEPS = 6
SETTINGS = {
    "replicate": [],
    "shard": [],
    "stream": ["strategy.resident_layers=1", "layer_inputs=host", "optim.offload=true"],
    "pipeline": ["embedding=host", "lm_head=host"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four layers with its tokenizer, and a data set."""
    place = tmp_path_factory.mktemp("strategies")
    tiny_files.save(tiny.model("llama_tied", num_hidden_layers=4), place / "model")
    tiny_files.write_data(place / "data.jsonl")
    return place


@pytest.fixture(scope="module")
def train(folder: Path) -> Iterator[Callable[..., list[int | None]]]:
    """Trains on two ranks; their exit codes."""
    with two_ranks() as start:

        def run(strategy: str, output: Path, *more: str) -> list[int | None]:
            argv = arguments(folder, output, f"strategy={strategy}", *SETTINGS[strategy], *more)
            return exit_codes(start(argv, stderr=output.parent))

        yield run


@pytest.fixture(scope="module")
def runs(
    train: Callable[..., list[int | None]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The folder of a whole run under each strategy."""
    place = tmp_path_factory.mktemp("runs")
    for strategy in SETTINGS:
        more = (f"loop.max_steps={STEPS}", "checkpoint.every=3", "loop.eval_every=3")
        assert train(strategy, place / strategy, *more) == [0, 0], strategy
    return {strategy: place / strategy for strategy in SETTINGS}


@pytest.mark.parametrize("strategy", ["shard", "stream", "pipeline"])
def test_it_trains_and_answers_as_replicate_does(strategy: str, runs: dict[str, Path]) -> None:
    ours, theirs = losses(runs[strategy]), losses(runs["replicate"])
    assert ours == (theirs if strategy != "pipeline" else pytest.approx(theirs, rel=1e-5))
    found, expected = adapter(runs[strategy]), adapter(runs["replicate"])
    assert found.keys() == expected.keys()
    assert tiny.difference(found, expected) <= (0 if strategy != "pipeline" else 1e-4)
    figures, reference = (
        json.loads((runs[name] / "evaluation.json").read_text()) for name in (strategy, "replicate")
    )
    assert figures["samples"] == reference["samples"]
    assert figures["tuned"]["nll"] == pytest.approx(reference["tuned"]["nll"], rel=1e-5)


def test_what_moved_on_all_ranks_stands_in_the_metrics(runs: dict[str, Path], folder: Path) -> None:
    (cache,) = (folder / "frozen-cache" / "frozen").iterdir()
    layer_bytes = (cache / "layer_000.bin").stat().st_size
    head_bytes = 4 * math.prod(tiny.model("llama_tied").lm_head.weight.shape)
    last = {
        strategy: [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line][-1]
        for strategy, output in runs.items()
    }
    rows = {
        strategy: {kind: line[f"{kind}_bytes"] for kind in ("gather", "h2d", "stage")}
        for strategy, line in last.items()
    }
    none = {"gather": 0, "h2d": 0, "stage": 0}
    assert rows["replicate"] == none
    # Of 4 layers and 2 slots 2 x 4 - 4 are brought a step: half of each to either of two ranks.
    assert rows["shard"] == none | {"gather": 4 * layer_bytes}
    # One of the 4 is resident: 2 x 3 - 4 are copied on both.
    assert rows["stream"] == none | {"h2d": 2 * 2 * layer_bytes}
    # The head, for each of 4 micro-batches, on the last rank alone.
    assert rows["pipeline"] == none | {
        "h2d": 4 * head_bytes,
        "stage": rows["pipeline"]["stage"],
    }
    assert rows["pipeline"]["stage"] > 0
    for strategy, line in last.items():
        assert isinstance(line["peak_host_bytes"], int)
        assert line["wait_s"] > 0 or strategy == "replicate"
        assert bool(line["sync_bytes"]) is (strategy != "pipeline")


# Each as what a run leaves and as what takes it over; every state under every strategy is moved in
# tests/strategy/test_moving.py.
@pytest.mark.parametrize(
    ("before", "after"), [("shard", "stream"), ("stream", "pipeline"), ("pipeline", "shard")]
)
def test_a_run_goes_on_under_another_strategy(
    before: str,
    after: str,
    train: Callable[..., list[int | None]],
    runs: dict[str, Path],
    tmp_path: Path,
) -> None:
    output = tmp_path / "moved"
    shutil.copytree(runs[before], output)
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
    assert train(after, output, f"loop.max_steps={STEPS}") == [0, 0]
    assert losses(output) == pytest.approx(losses(runs["replicate"]), rel=1e-5)
    assert tiny.difference(adapter(output), adapter(runs["replicate"])) <= 1e-4


@pytest.mark.parametrize("before", ["shard", "pipeline"])
def test_a_run_moves_from_two_ranks_to_one(
    before: str,
    folder: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "moved"
    shutil.copytree(runs[before], output)
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
    alone = arguments(folder, output, f"loop.max_steps={STEPS}", "strategy=stream")
    assert main(alone) != 0  # half as many rows a step: said, with what keeps them
    assert "loop.gradient_accumulation_steps=4 keeps it" in capsys.readouterr().err
    assert main([*alone, "loop.gradient_accumulation_steps=4"]) == 0
    assert losses(output) == pytest.approx(losses(runs["replicate"]), rel=1e-5)
    assert tiny.difference(adapter(output), adapter(runs["replicate"])) <= 1e-4


def test_evaluate_on_one_rank_and_on_two(
    train: Callable[..., list[int | None]], runs: dict[str, Path]
) -> None:
    figures = runs["pipeline"] / "evaluation.json"
    before = json.loads(figures.read_text())
    figures.unlink()
    command = ["evaluate", f"output={runs['pipeline']}"]
    with two_ranks() as start:
        assert exit_codes(start(command)) == [0, 0]
    assert json.loads(figures.read_text())["tuned"] == before["tuned"]
    assert main([*command, "strategy=stream", "schedule=grouped"]) == 0
    again = json.loads(figures.read_text())
    assert again["samples"] == before["samples"]
    assert again["tuned"]["nll"] == pytest.approx(before["tuned"]["nll"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["shard", "stream", "pipeline"])
def test_a_flipped_byte_of_the_cache_stops_the_run(
    strategy: str,
    folder: Path,
    train: Callable[..., list[int | None]],
    runs: dict[str, Path],
    tmp_path: Path,
) -> None:
    (cache,) = (folder / "frozen-cache" / "frozen").iterdir()
    copy = tmp_path / "cache" / "frozen" / cache.name
    shutil.copytree(cache, copy)
    file = copy / "layer_003.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(data)
    codes = train(strategy, tmp_path / "run", f"frozen.cache_dir={tmp_path / 'cache'}")
    assert 0 not in codes
    for rank in range(2):
        said = (tmp_path / f"stderr{rank}").read_text()
        assert "layer 3 on rank" in said
        assert f"{file} was made with (checksum)" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run" / "adapter").exists()
