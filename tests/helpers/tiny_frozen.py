"""Frozen caches of a tiny checkpoint, and faults for its files."""

from collections.abc import Callable
from pathlib import Path

import tiny
import tiny_files
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.build import open_or_build
from fttrain.frozen.cache import FrozenCache
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import resolve
from fttrain.quant.config import QuantConfig
from fttrain.strategy.builder import frozen_base

ALONE = RankGroup(0, 1, 0, tiny.CPU)
LAYERS = 6


def model(folder: Path) -> Path:
    """A checkpoint of six layers in several shards."""
    source = tiny.model(num_hidden_layers=LAYERS)
    return tiny_files.save(source, folder, max_shard_size="300KB")


def build(
    model: Path,
    root: Path,
    group: RankGroup = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    verify: bool = False,
    quant: QuantConfig | None = None,
) -> FrozenCache:
    base = frozen_base(resolve(ModelConfig("tiny", str(model))), quant or QuantConfig(), "float32")
    return open_or_build(base, str(root), group, progress, verify)


def content(cache: FrozenCache, layer: int) -> torch.Tensor:
    flat = torch.empty(cache.path(layer).stat().st_size, dtype=torch.uint8)
    cache.read(layer, flat)
    return flat


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])
