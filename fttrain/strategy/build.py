"""Puts a strategy together from the parts of the configuration."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fttrain.checkpoint.frozen import check_quantisation, load_ends, load_layers
from fttrain.checkpoint.readers import open_checkpoint
from fttrain.checkpoint.source import Source, load_config, quantisation_of
from fttrain.dist import Group
from fttrain.errors import UserError
from fttrain.model.decoder import Architecture, Decoder
from fttrain.model.lora import LoraConfig
from fttrain.optim.factory import OptimConfig
from fttrain.quant.scheme import QuantConfig
from fttrain.schedule.grouped import ScheduleConfig
from fttrain.schedule.layer_pass import check_activations
from fttrain.store.resident import ResidentStore
from fttrain.strategy.protocol import Strategy, StrategyConfig
from fttrain.strategy.replicate import Replicate


@dataclass(frozen=True)
class Recipe:
    """Everything a native strategy is made of."""

    strategy: StrategyConfig
    quant: QuantConfig
    lora: LoraConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    activations: str
    dtype: str
    seed: int


def build_strategy(
    recipe: Recipe,
    source: Source,
    group: Group,
    progress: Callable[[int, int], None] | None = None,
) -> Strategy:
    """Load the frozen base and build the strategy around it, adapters at their start.

    ``progress(done, total)`` counts layers. Raises UserError for a checkpoint that cannot be used.
    """
    check_activations(recipe.activations)
    dtype = getattr(torch, recipe.dtype)
    if group.device.type == "cuda" and dtype == torch.float32:
        raise UserError("model.dtype=float32: flash attention on a GPU takes model.dtype=bfloat16")
    check_quantisation(quantisation_of(source), recipe.quant)
    config = load_config(source)
    architecture = Architecture(config)
    frozen_format = architecture.frozen_format(recipe.quant, dtype)
    reader = open_checkpoint(source, config)
    ends = load_ends(reader, architecture, group.device, dtype)
    flats = load_layers(reader, architecture, frozen_format, group.device, progress or _silent)
    decoder = Decoder(architecture, ends.embedding, ends.final_norm, ends.head, recipe.lora)
    for layer in decoder.layers:
        layer.adapters.reset(recipe.seed)
    return Replicate(
        decoder,
        ResidentStore(flats, frozen_format),
        group,
        recipe.optim,
        recipe.schedule,
        recipe.activations,
        recipe.seed,
    )


def _silent(done: int, total: int) -> None:
    """What ranks other than 0 show."""
