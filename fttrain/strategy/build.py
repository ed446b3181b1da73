"""Puts a strategy together: what it needs is compared with what the machine has, then loaded."""

from collections.abc import Callable
from typing import Any

import torch

from fttrain.checkpoint.frozen import check_quantisation
from fttrain.checkpoint.frozen_cache import open_or_build
from fttrain.checkpoint.source import Source, load_config, quantisation_of
from fttrain.dist import Group
from fttrain.errors import UserError
from fttrain.model.decoder import Architecture
from fttrain.store.hostpool import HostPool
from fttrain.strategy import pipeline, replicate, shard, stream
from fttrain.strategy.protocol import Strategy
from fttrain.strategy.recipe import Plan, Recipe, check_pair

PAGES: dict[str, Any] = {
    "replicate": replicate,
    "shard": shard,
    "stream": stream,
    "pipeline": pipeline,
}


def build_strategy(
    recipe: Recipe,
    source: Source,
    group: Group,
    progress: Callable[[int, int], None] | None = None,
) -> Strategy:
    """Load the frozen base and build the strategy around it, adapters at their start.

    ``progress(done, total)`` counts layers. Raises UserError for a checkpoint that cannot be used
    and, before anything is loaded, for a machine that is too small.
    """
    check_pair(recipe.strategy, recipe.schedule)
    dtype = getattr(torch, recipe.dtype)
    if group.device.type == "cuda" and dtype == torch.float32:
        raise UserError("model.dtype=float32: flash attention on a GPU takes model.dtype=bfloat16")
    check_quantisation(quantisation_of(source), recipe.quant)
    architecture = Architecture(load_config(source))
    frozen_format = architecture.frozen_format(recipe.quant, dtype)
    plan = Plan(recipe, group, architecture, frozen_format, HostPool(group))
    page = PAGES[recipe.strategy.name]
    share = page.book(plan)
    plan.pool.check()
    progress = progress or _silent
    cache = open_or_build(...)
    return page.build(plan, cache, share, progress)


def _silent(done: int, total: int) -> None:
    """What ranks other than 0 show."""
