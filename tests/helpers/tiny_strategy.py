"""Strategies over a tiny random model, built as a run builds them, from a frozen base in memory."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed
from torch import Tensor

from fttrain.data.batch import IGNORE, MicroBatch, collate
from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.config import FrozenConfig
from fttrain.frozen.quantize_layer import ENDS
from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture, Decoder
from fttrain.optim.config import OptimConfig
from fttrain.quant.checksum import checksum
from fttrain.quant.config import QuantConfig
from fttrain.schedule.activations import Recompute
from fttrain.schedule.config import ScheduleConfig
from fttrain.store.verify import VerifiedStore
from fttrain.strategy.builder import StrategyBuilder
from fttrain.strategy.config import SCHEDULES, Placement, StrategyConfig
from fttrain.strategy.data_parallel import DataParallel
from fttrain.strategy.grad_reduce import gradient_sync
from fttrain.strategy.gradients import ResidentGradients
from fttrain.strategy.native import StrategyParts
from fttrain.strategy.protocol import Judge, StepStats
from fttrain.strategy.spec import StepSize, StrategySpec

LAYERS = 5
# Tokens of the documents of each of a step's micro-batches; one has no target, one is empty.
LENGTHS = ((9, 17, 4), (3,), (66,), (12, 5), (30, 1), (8,), (), (21, 2))
SEQ_LEN = 66
LR = 1e-2
SPEC = StrategySpec(
    strategy=StrategyConfig(),
    quant=QuantConfig(),
    lora=LoraConfig(r=4, lora_alpha=10, lora_dropout=0.2),
    optim=OptimConfig(lr=LR, weight_decay=0.01, max_grad_norm=0.05),
    schedule=ScheduleConfig(),
    placement=Placement(),
    frozen=FrozenConfig(),
    size=StepSize(1, SEQ_LEN, len(LENGTHS)),
    dtype="float32",
    seed=7,
)


class MemoryBase:
    """The frozen base of a model in memory.

    ``read_into``: layer -> where its bytes went. On the CPU that is where a strategy keeps them.
    """

    def __init__(
        self,
        architecture: Architecture,
        quant: QuantConfig,
        dtype_name: str,
        weights: dict[str, Tensor],
    ) -> None:
        dtype, reader = getattr(torch, dtype_name), tiny.StateDict(weights)
        self.architecture = architecture
        self.frozen_format = architecture.frozen_format(quant, dtype)
        self.flats = tiny.load_layers(reader, architecture, self.frozen_format, tiny.CPU)
        ends = tiny.load_ends(reader, architecture, tiny.CPU, dtype)
        self._ends = dict(zip(ENDS, ends, strict=True))
        self.read_into: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.flats)

    def read(self, layer: int, into: Tensor, offset_bytes: int = 0) -> None:
        into.copy_(self.flats[layer][offset_bytes : offset_bytes + len(into)])
        self.read_into[layer] = into

    def checksum(self, layer: int) -> int:
        return int(checksum(self.flats[layer]))

    def path(self, layer: int) -> Path:
        return Path(f"/cache/layer_{layer:05d}.bin")

    @property
    def tied(self) -> bool:
        return self._ends["head"] is self._ends["embedding"]

    def read_end(self, name: str, into: Tensor) -> None:
        into.copy_(self._ends[name])


@functools.cache
def base(
    model: str = "llama",
    dtype: str = "float32",
    quant: QuantConfig = SPEC.quant,
    **shape: int,
) -> MemoryBase:
    """Of a tiny model with ``shape``, 5 layers unless that says otherwise."""
    source = tiny.model(model, **{"num_hidden_layers": LAYERS, **shape})
    return MemoryBase(Architecture(source.config), quant, dtype, source.state_dict())


def variant(
    strategy: str = "replicate",
    group: int | str = "all",
    offload: bool = False,
    shard: bool = False,
    resident_layers: Any = 0,
    slots: int = 2,
    dtype: str = "float32",
    verify_every: int = 1,
    **placement: Any,
) -> StrategySpec:
    """``SPEC`` with these changes."""
    return replace(
        SPEC,
        strategy=StrategyConfig(strategy, resident_layers, slots),
        schedule=ScheduleConfig(group, SCHEDULES[strategy]),
        optim=replace(SPEC.optim, offload=offload, shard=shard),
        placement=Placement(**placement),
        frozen=FrozenConfig(verify_every=verify_every),
        dtype=dtype,
    )


def this_group() -> RankGroup:
    """This rank among those of ``run_ranks``; a single one without it."""
    if not torch.distributed.is_initialized():
        return RankGroup(0, 1, 0, tiny.CPU)
    rank = torch.distributed.get_rank()
    return RankGroup(rank, torch.distributed.get_world_size(), rank, tiny.CPU)


def build(spec: StrategySpec, frozen: MemoryBase, group: RankGroup | None = None) -> Any:
    """The strategy, as a run builds it; adapters random, B not zero."""
    strategy = start(spec, frozen, group)
    tiny.randomise(strategy.decoder)
    return strategy


def start(spec: StrategySpec, frozen: MemoryBase, group: RankGroup | None = None) -> Any:
    """The strategy, as a run builds it."""
    group = group or this_group()
    builder = StrategyBuilder(spec, frozen.architecture, frozen.frozen_format, group)
    return builder.build(frozen, lambda done, total: None)


def data_parallel(
    decoder: Decoder, store: VerifiedStore, group: RankGroup, optim: OptimConfig
) -> DataParallel:
    """All of a step's micro-batches pass a layer together; everything is on the device."""
    adapters = [layer.adapters for layer in decoder.layers]
    gradients = ResidentGradients(adapters, gradient_sync(group))
    joined = StrategyParts(
        decoder, store, group, optim, [Recompute()] * len(store), gradients, SPEC.seed
    )
    return DataParallel(joined, ScheduleConfig("all"))


def micro_batches(strategy: Any, step: int = 0) -> list[MicroBatch]:
    """This rank's of optimizer step ``step``: the same of all ranks together on any number."""
    made = []
    for index, lengths in enumerate(LENGTHS):
        documents = tiny.documents(lengths, seed=100 * step + index, masked=0.3)
        if index == 1:
            documents = [(ids, [IGNORE] * len(ids)) for ids, _ in documents]
        made.append(collate(documents, index))
    rank, world_size = strategy.data_parallel
    return made[rank::world_size]


def apply(strategy: Any, step: int, accept: Judge = lambda loss, norm: True) -> StepStats:
    """A step that is applied."""
    stats: StepStats = strategy.train_step(micro_batches(strategy, step), step, LR, accept)
    return stats


def evaluated(strategy: Any) -> tuple[float, int]:
    """An evaluation of the micro-batches of step 0: loss sum in nats, target tokens."""
    sums = strategy.evaluate(micro_batches(strategy))
    return sums.metrics["nll"], sums.targets


def measure(strategy: Any, step: int) -> tuple[StepStats, dict[str, Tensor]]:
    """A step that is not applied: its figures and the gradient of the loss sum, of the layers that
    this rank has.
    """
    stats = strategy.train_step(micro_batches(strategy, step), step, LR, lambda loss, norm: False)
    return stats, tiny.gradients(strategy.decoder)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def adapters(strategy: Any) -> dict[str, Tensor]:
    """A copy of the masters of the layers that this rank has, or with optim.shard of its parts."""
    layers = strategy.decoder.layers
    if layers[0].adapters.layout.shard.world_size > 1:
        strategy.optimizer_state()  # which waits for the update
        return {str(layer.index): layer.adapters.flat.detach().clone() for layer in layers}
    return copied(dict(tiny.named_masters(strategy.decoder)))
