"""Nodes that would do different work are refused, by evaluate as by train."""

import os
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_run import arguments, inputs

from fttrain import UserError, evaluate, load_config, load_run_config, train


def refusal(command: str, folder: Path, output: Path) -> str:
    """On one of two nodes of one rank each, which are given different seeds."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    seed = f"loop.seed={os.environ['RANK']}"
    if command == "evaluate":
        config = load_run_config(output, [seed])
    else:
        other = output.with_name("other")
        config = load_config(arguments(folder, other, "loop.max_steps=1", seed)[1:])
    with pytest.raises(UserError) as refused:
        evaluate(config) if command == "evaluate" else train(config)
    return str(refused.value)


def test_nodes_with_different_settings_are_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = inputs(tmp_path_factory)
    output = folder / "run"
    settings = arguments(folder, output, "loop.max_steps=1", "loop.samples=0")[1:]
    assert train(load_config(settings)).exit_code == 0
    before = (output / "evaluation.json").read_bytes()
    for command in ("train", "evaluate"):
        for said in run_ranks(refusal, 2, command, folder, output, process_group=False):
            assert said.startswith("loop.seed is 0 on machine 0 ("), command
            assert said.endswith("the same command on every machine helps"), command
    assert (output / "evaluation.json").read_bytes() == before
