"""The sides of the fit benchmark: each lever trains the same model, and moves what it should."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from ranks import run_ranks
from smoke import ROOT

from fttrain.distributed.process_group import process_group

Module = Callable[[str], ModuleType]
STEPS = 2


def test_what_is_asked_for_is_chosen(module: Module) -> None:
    sides = module("harness.fit_sides")

    def names(texts: list[str] | None, with_levers: bool = False) -> list[str]:
        return [side.name for side in sides.chosen_sides("llama3_70b", texts, with_levers)]

    assert names(None) == ["shard", "stream k=30", "stream k=0", "pipeline"]
    assert len(set(names(None, with_levers=True))) == len(names(None)) + sum(
        len(bases) for _, bases, _ in sides.LEVERS
    )
    assert names(["shard", "pipeline"]) == ["shard", "pipeline"]  # and not their levers
    assert names(["activations=offload", "pipeline"]) == [
        "pipeline",
        "shard activations=offload",
        "stream k=0 activations=offload",
    ]
    assert names(["nothing"]) == []


def trained(benchmarks: str) -> dict[str, Any]:
    """The steps of all sides on this rank, one after the other, and what their side streams
    copied.
    """
    sys.path.insert(0, benchmarks)
    sides, steps, link = (
        importlib.import_module(f"harness.{name}") for name in ("fit_sides", "fit_steps", "link")
    )
    job = {"shape": sides.SHAPES["tiny"], "seq_len": 48, "accumulation": 2, "ranks": 2}
    found = {}
    with process_group(torch.device("cpu")) as group:
        for side in sides.chosen_sides("tiny", None, with_levers=True):
            own = job | side.settings | {"steps": STEPS}
            with link.paced({"gb_s": 10.0, "own_gb_s": {"host to host": 20.0}}) as ways:
                strategy = steps.build(own, group, print)
                loaded_bytes = ways["host to host"].carried_bytes
                done = steps.train(own, group, strategy, print)
                carried_bytes = ways["host to host"].carried_bytes - loaded_bytes
            found[side.name] = {"steps": done, "carried_bytes": carried_bytes}
    return found


def test_levers_train_the_same_model_and_move_what_they_should() -> None:
    ranks = run_ranks(trained, 2, str(ROOT / "benchmarks"), process_group=False)
    for found in ranks:
        losses = {name: [step["loss"] for step in side["steps"]] for name, side in found.items()}
        usual = losses["shard"]
        for name, own in losses.items():
            near = 0.01 if "lm_head=quantized" in name else 1e-4
            assert own == pytest.approx(usual, rel=near), name
            assert (own == pytest.approx(usual, rel=1e-6)) != ("lm_head=quantized" in name), name
        for name, side in found.items():
            step = side["steps"][-1]
            assert bool(step["activation_bytes"]) == ("activations=offload" in name), name
            came_bytes = sum(s["h2d_bytes"] + s["activation_bytes"] for s in side["steps"])
            assert side["carried_bytes"] >= came_bytes, name  # and what left, and what is not told
        no_head = found["shard lm_head=quantized"]["steps"][-1]["h2d_bytes"]
        assert no_head == 0 < found["shard"]["steps"][-1]["h2d_bytes"]
