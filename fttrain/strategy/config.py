"""Settings of the strategy and of the placement of a step's tensors, and checks of both."""

from dataclasses import dataclass, field

from fttrain.model.config import (
    AUTO_KERNELS,
    KERNELS,
    LIGER_KERNELS,
    MASK_TOKENS,
    LoraConfig,
)
from fttrain.optim.config import OptimConfig
from fttrain.quant.config import QuantConfig
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.zero_checks import check_placement, check_whole_weights, check_zero
from fttrain.strategy.zero_config import DEEPSPEED, ZeroConfig
from fttrain.util.errors import UserError

# Native strategy -> the schedule it runs with; every other pair is refused by name.
SCHEDULES = {
    "replicate": "grouped",
    "shard": "grouped",
    "stream": "grouped",
    "pipeline": "one_f_one_b",
}
AUTO = "auto"  # the planner chooses, before anything is built; no strategy of its own
NAMES = (*SCHEDULES, DEEPSPEED, AUTO)
POLICIES = ("recompute", "keep", "offload")


@dataclass(frozen=True)
class StrategyConfig:
    """The strategy: how the frozen base is divided among the ranks."""

    # replicate: whole on each rank | shard: a part of each layer on each rank, gathered before use
    # | stream: in host memory, copied before use | pipeline: some layers on each rank
    # | deepspeed: as ZeRO divides it, by DeepSpeed and transformers' own model
    # | auto: the fastest native one that fits, with its schedule and split of a step's rows
    name: str = "replicate"
    # stream: layers that stay on the device: a number | all | a list with a number for each rank
    resident_layers: int | str | tuple[int, ...] = 0
    slots: int = 2  # stream: layers on the device beside the resident ones: 2 or 3
    zero: ZeroConfig = field(default_factory=ZeroConfig)  # of deepspeed

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"strategy={self.name}: {', '.join(NAMES)}")
        if self.name != DEEPSPEED and not self.zero.is_default:
            raise UserError(
                f"strategy={self.name}: strategy.zero.* belongs to strategy={DEEPSPEED}"
            )
        if self.name != "stream" and (self.resident_layers, self.slots) != (0, 2):
            raise UserError(
                f"strategy={self.name}: strategy.resident_layers and strategy.slots belong to "
                "strategy=stream"
            )
        if self.slots not in (2, 3):
            raise UserError(f"strategy.slots={self.slots}: 2 or 3")
        setting = self.resident_layers
        numbers = (setting,) if isinstance(setting, int) else setting
        if setting != "all" and (isinstance(numbers, str) or min(numbers, default=-1) < 0):
            raise UserError(
                f"strategy.resident_layers={setting}: a number of 0 or more, all, or a list with "
                "one for each rank of a machine"
            )

    def resident(self, rank: int, world_size: int, layers: int) -> int:
        """The number of the model's ``layers`` that stay on the device of ``rank``, one of a node's
        ``world_size``.

        Raises UserError for more layers than the model has, and for a list of another length.
        """
        setting = self.resident_layers
        if isinstance(setting, str):
            return layers
        if isinstance(setting, tuple) and len(setting) != world_size:
            raise UserError(
                f"strategy.resident_layers={list(setting)}: a number for each of {world_size} "
                "rank(s) of a machine"
            )
        count = setting if isinstance(setting, int) else setting[rank]
        if count > layers:
            raise UserError(
                f"strategy.resident_layers={count}: the model has {layers} layers; all keeps them "
                "all"
            )
        return count


@dataclass(frozen=True)
class Placement:
    """The placement of all tensors of a step but the frozen layers."""

    # A layer's tensors for backward: recompute (its input alone) | keep (all, on the device) |
    # offload (all, in host memory), or a list by layer, such as (recompute*60, offload*20)
    activations: str | tuple[str, ...] = "recompute"
    layer_inputs: str = "device"  # the inputs of layers until their backward: device | host
    embedding: str = "device"  # the table: device | host
    # The output projection: device | host (copied to the device for each use) | quantized (on the
    # device in 4 bits, as quant says; NF4 where quant=none)
    lm_head: str = "device"
    # Tokens of a micro-batch that pass a layer's MLP at once: a multiple of MASK_TOKENS | all
    mlp_tile_tokens: int | str = 4096

    def __post_init__(self) -> None:
        for key, allowed in (
            ("layer_inputs", ("device", "host")),
            ("embedding", ("device", "host")),
            ("lm_head", ("device", "host", "quantized")),
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
        if self.layer_inputs == "host" and "recompute" not in used:
            raise UserError(
                f"layer_inputs=host: activations={self._written()} leaves none; layers with "
                "activations=recompute do"
            )

    @property
    def tile_tokens(self) -> int:
        """Tokens of an MLP's tile; 0: all at once."""
        return 0 if isinstance(self.mlp_tile_tokens, str) else self.mlp_tile_tokens

    def policies(self, layers: int) -> list[str]:
        """The activation policy of each of the model's ``layers``: recompute, keep or offload.

        Raises UserError for a list that is longer or shorter.
        """
        if isinstance(self.activations, str):
            return [self.activations] * layers
        policies = [policy for policy, count in self._runs() for _ in range(count)]
        if len(policies) != layers:
            raise UserError(
                f"activations={self._written()}: {len(policies)} layers, the model has {layers}"
            )
        return policies

    def _runs(self) -> list[tuple[str, int]]:
        """(policy, number of layers in a row) as they are written; one pair for a single policy."""
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


def check_together(strategy: StrategyConfig, schedule: ScheduleConfig, optim: OptimConfig) -> None:
    """Raise UserError for settings of a native strategy that do not go together."""
    if strategy.name not in SCHEDULES:  # the strategy that auto chooses is checked later
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


def check_kernels(kernels: str, strategy: StrategyConfig) -> None:
    """Raise UserError for unknown kernels, and for kernels that ``strategy`` does not use."""
    if kernels not in KERNELS:
        raise UserError(f"kernels={kernels}: {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")
    if kernels == LIGER_KERNELS and strategy.name == DEEPSPEED:
        raise UserError(
            f"kernels={kernels} with strategy={DEEPSPEED}: its layers are transformers' own; write "
            f"kernels={AUTO_KERNELS}"
        )


def check_trained(
    strategy: StrategyConfig,
    quant: QuantConfig,
    lora: LoraConfig,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    placement: Placement,
) -> None:
    """Raise UserError for weights that cannot train, and for settings that DeepSpeed would not
    honour.
    """
    check_whole_weights(strategy.name, lora, quant)
    if strategy.name == DEEPSPEED:
        check_zero(lora, optim, schedule)
        check_placement(placement, quant)
