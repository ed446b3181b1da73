"""What a rank of ``fit70b.py`` trains: a strategy on random bytes, for some optimizer steps."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig

from fttrain.data.batch import MicroBatch, collate
from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.config import FrozenConfig
from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture
from fttrain.optim.config import OptimConfig
from fttrain.plan.random_base import RandomBase
from fttrain.quant.config import QuantConfig
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.builder import StrategyBuilder
from fttrain.strategy.config import SCHEDULES, Placement, StrategyConfig
from fttrain.strategy.protocol import StepStats, Strategy
from fttrain.strategy.spec import StepSize, StrategySpec

Say = Callable[[str], None]
Steps = list[dict[str, Any]]
TOLD_LAYERS = 20  # layers between two lines of progress


def build(job: dict[str, Any], group: RankGroup, say: Say) -> Strategy:
    """The job's strategy, adapters at their start.

    Raises UserError for a machine that is too small.
    """
    spec, architecture = trial_spec(job), architecture_of(job["shape"])
    frozen_format = architecture.frozen_format(spec.quant, torch.bfloat16)
    blueprint = StrategyBuilder(spec, architecture, frozen_format, group)

    def progress(done: int, total: int) -> None:
        if done % TOLD_LAYERS == 0 or done == total:
            say(f"loaded {done} of {total} layers")

    return blueprint.build(RandomBase(architecture.layers, frozen_format), progress)


def architecture_of(shape: dict[str, Any]) -> Architecture:
    """Where a row is longer than the model was made for, rotary angles alone are extrapolated."""
    return Architecture(LlamaConfig(**shape, max_position_embeddings=1 << 20))


def trial_spec(job: dict[str, Any]) -> StrategySpec:
    """What a job's strategy is built from."""
    strategy = StrategyConfig(**job["strategy"])
    return StrategySpec(
        strategy,
        QuantConfig(),
        LoraConfig(r=16),
        OptimConfig(**job["optim"]),
        ScheduleConfig(**job["schedule"], kind=SCHEDULES[strategy.name]),
        Placement(**job["placement"]),
        FrozenConfig(),
        StepSize(1, job["seq_len"], job["accumulation"]),
        "bfloat16",
        seed=0,
    )


def train(
    job: dict[str, Any],
    group: RankGroup,
    trained: Strategy,
    say: Say,
    note: Callable[[Steps], None] = lambda steps: None,
) -> Steps:
    """The figures of each step. ``note``: takes those of all steps so far, after each."""
    batches = _batches(job, *trained.data_parallel)
    steps: Steps = []
    for number in range(job["steps"]):
        group.barrier()
        started = time.perf_counter()
        stats = trained.train_step(batches, number, 1e-4, lambda loss, norm: True)
        if group.device.type == "cuda":
            torch.cuda.synchronize()
        step_s = time.perf_counter() - started
        say(f"step {number + 1} of {job['steps']}: {step_s:.1f} s, loss {stats.loss:.3f}")
        steps.append({"step_s": step_s, **_figures(stats)})
        note(steps)
    # What the last update still fetches comes before this. Where the strategy went first, gloo
    # would have no place for it and read no further.
    group.barrier()
    return steps


def _batches(job: dict[str, Any], place: int, places: int) -> list[MicroBatch]:
    """This rank's micro-batches, a document each; over all ranks the same under any strategy."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = job["shape"]["vocab_size"]
    batches = []
    for index in range(job["accumulation"] * job["ranks"]):
        ids = torch.randint(vocabulary, (job["seq_len"],), generator=generator).tolist()
        if index % places == place:
            batches.append(collate([(ids, ids)], index))
    return batches


def _figures(stats: StepStats) -> dict[str, Any]:
    return {
        "loss": stats.loss,
        "tokens": stats.tokens,
        "wait_s": stats.traffic.wait_s,
        "gather_bytes": stats.traffic.gather_bytes,
        "h2d_bytes": stats.traffic.h2d_bytes,
        "stage_bytes": stats.traffic.stage_bytes,
        "activation_bytes": stats.traffic.activation_bytes,
        "sync_bytes": stats.sync.sync_bytes,
    }
