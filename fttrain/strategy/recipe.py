"""What a native strategy is told, before anything is loaded."""

from dataclasses import dataclass
from typing import Any

import torch

from fttrain.checkpoint.frozen_cache import FrozenConfig
from fttrain.data.batch import ROW_MULTIPLE
from fttrain.dist import Group
from fttrain.errors import UserError
from fttrain.model.decoder import Architecture
from fttrain.model.linears import MASK_TOKENS
from fttrain.model.lora import LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.quant.scheme import QuantConfig
from fttrain.schedule import ScheduleConfig
from fttrain.store.hostpool import HostPool
from fttrain.strategy.protocol import SCHEDULES, StrategyConfig
from fttrain.strategy.zero.checks import check_placement, check_whole_weights, check_zero
from fttrain.strategy.zero.config import DEEPSPEED
from fttrain.units import round_up

POLICIES = ("recompute", "keep", "offload")


@dataclass(frozen=True)
class Placement:
    """Where a step keeps what is not the frozen layers."""

    # What a layer leaves for backward: recompute (its input) | keep | offload (everything, on the
    # device or the host), or a list by layer, such as (recompute*60, offload*20)
    activations: str | tuple[str, ...] = "recompute"
    boundaries: str = "device"  # the inputs of layers until their backward: device | host
    embedding: str = "device"  # the table: device | host
    # the output projection: resident (on the device) | streamed (in host memory, brought for each
    # use) | nf4 (on the device in 4 bits, as quant says; NF4 where quant=none)
    head: str = "resident"
    # Tokens of a micro-batch that pass a layer's MLP at once: a multiple of MASK_TOKENS | all
    mlp_tile_tokens: int | str = 4096

    def __post_init__(self) -> None:
        for key, allowed in (
            ("boundaries", ("device", "host")),
            ("embedding", ("device", "host")),
            ("head", ("resident", "streamed", "nf4")),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise UserError(f"{key}={value}: {', '.join(allowed[:-1])} or {allowed[-1]}")
        tile = self.mlp_tile_tokens
        if tile != "all" and (isinstance(tile, str) or tile < 1 or tile % MASK_TOKENS):
            raise UserError(
                f"mlp_tile_tokens={tile}: all, or a multiple of {MASK_TOKENS} tokens such as 4096"
            )
        if not self.activations:
            raise UserError(f"activations is empty: {', '.join(POLICIES)}, or a list by layer")
        used = {policy for policy, _ in self._runs()}
        if self.boundaries == "host" and "recompute" not in used:
            raise UserError(
                f"boundaries=host: activations={self._written()} leaves none; layers with "
                "activations=recompute do"
            )

    @property
    def tile_tokens(self) -> int:
        """Of the MLP; 0: all at once."""
        return 0 if isinstance(self.mlp_tile_tokens, str) else self.mlp_tile_tokens

    def policies(self, layers: int) -> list[str]:
        """What each of the model's ``layers`` does: recompute, keep or offload.

        Raises UserError for a list that is longer or shorter.
        """
        if isinstance(self.activations, str):
            return [self.activations] * layers
        found = [policy for policy, count in self._runs() for _ in range(count)]
        if len(found) != layers:
            raise UserError(
                f"activations={self._written()}: {len(found)} layers, the model has {layers}"
            )
        return found

    def _runs(self) -> list[tuple[str, int]]:
        """(policy, layers in a row that have it) as they are written; one for a single policy."""
        written = self.activations
        runs = []
        for item in (written,) if isinstance(written, str) else written:
            policy, star, count = item.partition("*")
            if isinstance(written, str) or not star:
                policy, count = item, "1"
            if policy not in POLICIES or not count.isdecimal() or not int(count):
                raise UserError(
                    f"activations={self._written()}: {', '.join(POLICIES)}, or a list of them by "
                    "layer such as [recompute*60,offload*20]"
                )
            runs.append((policy, int(count)))
        return runs

    def _written(self) -> str:
        written = self.activations
        return written if isinstance(written, str) else f"[{','.join(written)}]"


@dataclass(frozen=True)
class StepSize:
    """The most that one optimizer step passes on a rank."""

    micro_batch_size: int = 1  # rows
    seq_len: int = 1  # tokens of a row
    gradient_accumulation_steps: int = 1  # micro-batches

    @property
    def row_tokens(self) -> int:
        """What is reckoned for each row of a micro-batch: so much that the parts it may be divided
        into (``Strategy.divide``) fit where it did, each with padding of its own.
        """
        return round_up(self.seq_len, ROW_MULTIPLE)

    @property
    def micro_batch_tokens(self) -> int:
        """The most tokens of a micro-batch, padding included."""
        return self.micro_batch_size * self.row_tokens


@dataclass(frozen=True)
class Recipe:
    """Everything a native strategy is made of."""

    strategy: StrategyConfig
    quant: QuantConfig
    lora: LoraConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    placement: Placement
    frozen: FrozenConfig
    size: StepSize
    dtype: str
    seed: int
    z_loss: float = 0.0  # as Head


def check_together(strategy: StrategyConfig, schedule: ScheduleConfig, optim: OptimConfig) -> None:
    """Raises UserError for settings of a native strategy that do not go together."""
    if strategy.name not in SCHEDULES:  # of auto what is chosen is asked again
        return
    wanted = SCHEDULES[strategy.name]
    if schedule.kind != wanted:
        raise UserError(
            f"strategy={strategy.name} with schedule={schedule.kind}: they do not go together; "
            f"write schedule={wanted}"
        )
    if optim.shard and strategy.name == "pipeline":
        raise UserError(
            "optim.shard=true with strategy=pipeline: each rank has the state of its own layers "
            "alone as it is; leave it out"
        )


def check_trained(
    strategy: StrategyConfig,
    quant: QuantConfig,
    lora: LoraConfig,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    placement: Placement,
) -> None:
    """Raises UserError where weights are to train that cannot, and for settings that DeepSpeed
    would not honour.
    """
    check_whole_weights(strategy.name, lora, quant)
    if strategy.name == DEEPSPEED:
        check_zero(lora, optim, schedule)
        check_placement(placement, quant)


@dataclass(frozen=True)
class Plan:
    """A recipe for one model on these ranks: what a strategy's page books and builds from."""

    recipe: Recipe
    group: Group
    architecture: Architecture
    frozen_format: FrozenFormat
    pool: HostPool

    @property
    def dtype(self) -> torch.dtype:
        found: Any = getattr(torch, self.recipe.dtype)
        return found

    @property
    def layer_bytes(self) -> int:
        return self.frozen_format.layout.size_bytes

    @property
    def table_bytes(self) -> int:
        """Of the embedding, or of the head (V, C)."""
        a = self.architecture
        return int(a.config.vocab_size) * a.hidden * self.dtype.itemsize
