"""What a profile learns from real steps (``trial.py``), each rank's in a fresh process: memory that
the measuring before it has touched must not count.
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
from fttrain.plan.trial import MICRO_BATCHES, Trial, recipe_of
from fttrain.plan.work import dequantisations, head_flops, layer_values, layer_work, weight_bytes
from fttrain.rig.measure import tell
from fttrain.rig.profile import CardProfile, RigProfile
from fttrain.strategy.spec import StrategySpec

LIMIT_S = 600.0  # that a trial may take before it counts as hanging


def calibrate(
    profile: RigProfile,
    spec: StrategySpec,
    architecture: Architecture,
    group: RankGroup,
    command: Sequence[str],
) -> RigProfile:
    """``profile`` with what real steps of a small model of ``architecture``'s shape say of
    each card. Every rank of ``group`` calls it and gets the same.

    command: starts a process that takes the trial and writes what it was told to the file whose
        path is added to it. Where that fails it is told, and the card stays as it is.
    """
    say = tell if group.is_main else lambda text: None
    say("a few real steps")
    group.barrier()
    problem, told = _run(command)
    ranks = [
        json.loads(group.broadcast_str(json.dumps([problem, told]), r))
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
    """``card``, which has its rates, with what is left of ``trial``'s seconds beside them."""
    assert card.gemm_flop_per_s is not None, "measured before"
    own = recipe_of(spec)
    context = memory.reserve_ranks(own, architecture, card.kind, [memory.ROOMY_BYTES])[0].context
    tokens = own.size.micro_batch_size * own.size.seq_len
    work = layer_work(architecture, own.lora, "recompute", own.size.seq_len)
    known_s = tokens * (work.forward + work.backward) / card.gemm_flop_per_s
    if card.dequantise_bytes_per_s:
        made = 2 * dequantisations(context, MICRO_BATCHES) / MICRO_BATCHES  # there and back
        known_s += made * weight_bytes(context) / card.dequantise_bytes_per_s
    beside_s = trial.layer_s - known_s
    values = tokens * layer_values(architecture)
    return replace(
        card,
        layer_values_per_s=values / beside_s if beside_s > 0 else None,
        head_flop_per_s=tokens * head_flops(architecture) / trial.head_s if trial.head_s else None,
        overhead_bytes=trial.overhead_bytes or card.overhead_bytes,
        allocator_bytes=trial.allocator_bytes,
    )


def _run(command: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """What went wrong, or "" and what was told."""
    with tempfile.TemporaryDirectory(prefix="fttrain-trial-") as folder:
        answer = Path(folder) / "answer.json"
        environment = os.environ | {PARENT_PID: str(os.getpid())}
        try:
            done = subprocess.run(
                [*command, str(answer)],
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
        if done.returncode or not answer.is_file():
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return said[-1].removeprefix("fttrain: error: "), {}
        return "", json.loads(answer.read_text())


def python(module: str, *arguments: str) -> list[str]:
    """The command of ``module`` in a process like this one."""
    return [sys.executable, "-m", module, *arguments]
