"""Rates of a profile that need real steps (``trial.py``). Each rank's trial runs in a fresh
process: memory that earlier measurements touched must not count.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fttrain.distributed.rank_group import RankGroup
from fttrain.launcher.environment import PARENT_PID
from fttrain.model.decoder import Architecture
from fttrain.plan import memory
from fttrain.plan.trial import MICRO_BATCHES, Trial, trial_spec
from fttrain.plan.work import dequantisations, head_flops, layer_values, layer_work, weight_bytes
from fttrain.rig.measure import print_progress
from fttrain.rig.profile import CardProfile, RigProfile
from fttrain.strategy.spec import StrategySpec

LIMIT_S = 600.0  # a longer trial counts as hanging


def calibrate(
    profile: RigProfile,
    spec: StrategySpec,
    architecture: Architecture,
    group: RankGroup,
    command: Sequence[str],
) -> RigProfile:
    """``profile`` with each card's rates from real steps of a small model of ``architecture``'s
    shape. Every rank of ``group`` calls it and gets the same profile.

    command: starts a process that runs the trial and writes its result to the file whose path is
        appended. Where that fails, a line says so and the card stays as it is.
    """
    say = print_progress if group.is_main else lambda text: None
    say("a few real steps")
    group.barrier()
    problem, mine = _run(command)
    ranks = [
        json.loads(group.broadcast_str(json.dumps([problem, mine]), r))
        for r in range(group.world_size)
    ]
    cards = list(profile.cards)
    for rank, (problem, figures) in enumerate(ranks):
        if problem:
            say(f"rank {rank}: no real steps could be timed: {problem}")
        else:
            cards[rank] = calibrated(cards[rank], Trial(**figures), spec, architecture)
    return replace(profile, cards=tuple(cards))


def calibrated(
    card: CardProfile, trial: Trial, spec: StrategySpec, architecture: Architecture
) -> CardProfile:
    """``card`` with the rates that explain the seconds of ``trial`` that its GEMM and
    dequantisation rates do not.
    """
    assert card.gemm_flop_per_s is not None, "measured before"
    step_spec = trial_spec(spec)
    context = memory.reserve_ranks(step_spec, architecture, card.kind, [memory.ROOMY_BYTES])[
        0
    ].context
    tokens = step_spec.size.micro_batch_size * step_spec.size.seq_len
    work = layer_work(architecture, step_spec.lora, "recompute", step_spec.size.seq_len)
    gemm_s = tokens * (work.forward + work.backward) / card.gemm_flop_per_s
    if card.dequantise_bytes_per_s:
        dequantised = (
            2 * dequantisations(context, MICRO_BATCHES) / MICRO_BATCHES
        )  # forward and backward
        gemm_s += dequantised * weight_bytes(context) / card.dequantise_bytes_per_s
    rest_s = trial.layer_s - gemm_s
    values = tokens * layer_values(architecture)
    return replace(
        card,
        layer_values_per_s=values / rest_s if rest_s > 0 else None,
        head_flop_per_s=tokens * head_flops(architecture) / trial.head_s if trial.head_s else None,
        overhead_bytes=trial.overhead_bytes or card.overhead_bytes,
        allocator_bytes=trial.allocator_bytes,
    )


def _run(command: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(problem, result): the problem is "" where there is a result."""
    with tempfile.TemporaryDirectory(prefix="fttrain-trial-") as folder:
        result = Path(folder) / "answer.json"
        environment = os.environ | {PARENT_PID: str(os.getpid())}
        try:
            process = subprocess.run(
                [*command, str(result)],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "it hangs", {}
        if process.returncode or not result.is_file():
            errors = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            return errors[-1].removeprefix("fttrain: error: "), {}
        return "", json.loads(result.read_text())


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs ``module`` with this interpreter."""
    return [sys.executable, "-m", module, *arguments]
