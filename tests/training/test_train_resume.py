"""A run that is stopped and goes on is the run that nobody stopped, wherever its parts live."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Fault, adapter, arguments, inputs, losses

from fttrain.cli import main
from fttrain.data.loader import Loader

STEPS, STOPPED = 5, 2
HOST = "strategy=stream layer_inputs=host embedding=host lm_head=host optim.offload=true"
PLACES = {
    "recompute": "activations=recompute",
    "keep": "activations=keep",
    "offload": "activations=offload",
    "by layer": "activations=[recompute,keep,offload,keep]",
    "host": HOST,
}
OTHERS = [("recompute", "offload"), ("offload", "keep"), ("by layer", "host"), ("host", "keep")]
OPTIMIZERS = [
    "adamw",
    "adamw8bit",
    "lion8bit",
    pytest.param("deepspeed_cpu_adam", marks=pytest.mark.deepspeed),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four layers with its tokenizer, and a data set."""
    return inputs(tmp_path_factory, layers=4)


def run(folder: Path, output: Path, *more: str) -> int:
    """In this process, one rank, with dropout and shuffling."""
    shortened = ("data.holdout=0", f"loop.max_steps={STEPS}")
    return main(arguments(folder, output, *shortened, *more))


def disturbed(folder: Path, output: Path, before: list[str], after: list[str]) -> Path:
    """Stopped by a signal in step ``STOPPED``, which is finished; then the same command again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "next_step", Loader.next_step)  # what the fault does is undone
        Fault(0, STOPPED - 1, signal.SIGTERM).inject()
        assert run(folder, output, *before) == 128 + signal.SIGTERM
    assert os.listdir(output / "checkpoints") == [f"step_{STOPPED:08d}"]
    assert run(folder, output, *after) == 0
    return output


def assert_same(found: Path, expected: Path) -> None:
    """Losses, adapter, the optimizer's state and the rest of the last snapshot, bit for bit."""
    assert losses(found) == losses(expected)
    assert list(losses(found)) == list(range(1, STEPS + 1))
    ours, theirs = adapter(found), adapter(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for file in ("optimizer.safetensors", "state.json"):
        ours_bytes, theirs_bytes = (
            (output / "checkpoints" / f"step_{STEPS:08d}" / file).read_bytes()
            for output in (found, expected)
        )
        assert ours_bytes == theirs_bytes, file


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped, everything at its default."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, output) == 0
    return output


@pytest.mark.parametrize(("before", "after"), [*((name, name) for name in PLACES), *OTHERS])
def test_wherever_its_parts_live(
    before: str, after: str, folder: Path, whole: Path, tmp_path: Path
) -> None:
    found = disturbed(folder, tmp_path / "run", PLACES[before].split(), PLACES[after].split())
    assert_same(found, whole)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_with_the_optimizer_on_the_host(kind: str, folder: Path, tmp_path: Path) -> None:
    # Rank 16: halves of 4096 values and more, of which bitsandbytes keeps moments in 8 bits.
    more = [f"optim={kind}", "optim.offload=true", "lora.r=16", "activations=offload"]
    assert run(folder, tmp_path / "whole", *more) == 0
    found = disturbed(folder, tmp_path / "run", more, more)
    assert_same(found, tmp_path / "whole")
    state = load_file(found / "checkpoints" / f"step_{STEPS:08d}" / "optimizer.safetensors")
    dtypes = {value.dtype for name, value in state.items() if value.ndim}
    assert (torch.uint8 in dtypes) is kind.endswith("8bit")
