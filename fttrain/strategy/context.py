"""The context of one build: a spec, a model, the ranks and the memory ledger."""

from dataclasses import dataclass
from typing import Any

import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.ledger import MemoryLedger
from fttrain.model.decoder import Architecture
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.strategy.spec import StrategySpec


@dataclass(frozen=True)
class BuildContext:
    """A spec for one model on these ranks: a strategy's page reserves and builds from it."""

    spec: StrategySpec
    group: RankGroup
    architecture: Architecture
    frozen_format: FrozenFormat
    ledger: MemoryLedger

    @property
    def dtype(self) -> torch.dtype:
        dtype: Any = getattr(torch, self.spec.dtype)
        return dtype

    @property
    def layer_bytes(self) -> int:
        return self.frozen_format.layout.size_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the embedding's table or of the head (V, C)."""
        a = self.architecture
        return int(a.config.vocab_size) * a.hidden * self.dtype.itemsize
