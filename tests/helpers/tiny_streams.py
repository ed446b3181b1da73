"""Whole steps of the real strategies under ``simulated_streams`` and ``simulated_nccl``."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import tiny
import tiny_strategy
from simulated_nccl import RANKS, simulated_nccl
from simulated_streams import simulated_streams
from stream_races import Race

from fttrain.data.batch import MicroBatch, collate
from fttrain.distributed.rank_group import RankGroup
from fttrain.strategy.protocol import OutOfMemory
from fttrain.strategy.spec import StepSize

LAYERS = 4
LENGTHS = ((9, 4), (12,), (3, 7))  # tokens of the documents of each micro-batch
STEPS = 2  # the second one meets what the first one left

Settings = dict[str, Any]
HOST: Settings = {"layer_inputs": "host", "embedding": "host", "lm_head": "host", "offload": True}
SHARD: Settings = {"strategy": "shard"}
STREAM: Settings = {"strategy": "stream"}
ON_HOST: Settings = {**STREAM, **HOST}
GROUPS: Settings = {**ON_HOST, "group": 1}
OFFLOAD: Settings = {**SHARD, "activations": "offload"}
PIPELINE: Settings = {"strategy": "pipeline", **HOST}
MIXED: Settings = {**ON_HOST, "activations": ("recompute", "offload", "keep", "offload")}


def races(settings: Settings, rank: int = 0, evaluated: bool = False) -> list[Race]:
    """What is found in steps of ``rank`` of two; one that runs out of memory is left out."""
    spec = tiny_strategy.variant(dtype="bfloat16", **settings)
    spec = replace(spec, size=StepSize(1, max(map(sum, LENGTHS)), len(LENGTHS)))
    frozen = tiny_strategy.base(dtype="bfloat16", num_hidden_layers=LAYERS)
    group = RankGroup(rank, RANKS, rank, tiny.CPU)
    if settings.get("strategy") == "stream":  # the other rank of a machine would fill half its copy
        group = replace(group, intra=RankGroup(0, 1, 0, tiny.CPU), inter=group)
    with simulated_streams() as simulation, simulated_nccl(rank, frozen.flats):
        strategy = tiny_strategy.build(spec, frozen, group)
        for step in range(STEPS):
            with suppress(OutOfMemory):
                strategy.train_step(micro_batches(step), step, 1e-2, lambda loss, norm: True)
        if evaluated:
            strategy.evaluate(micro_batches(STEPS))
        strategy.update.settle()
    return simulation.races


def micro_batches(step: int) -> list[MicroBatch]:
    seeded = enumerate(LENGTHS, 10 * step)
    return [collate(tiny.documents(lengths, seed), seed) for seed, lengths in seeded]
