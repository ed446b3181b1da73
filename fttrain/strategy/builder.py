"""Builder of a strategy: its needs are compared with the machine's memory, then it is loaded."""

import os
from collections.abc import Callable
from typing import Any

import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.build import open_or_build
from fttrain.frozen.cache import FrozenCache
from fttrain.frozen.quantize_layer import check_quantisation
from fttrain.frozen.source import Source, load_config, quantisation_of
from fttrain.frozen.spec import FrozenSpec
from fttrain.memory.advice import explain_out_of_memory
from fttrain.memory.ledger import MemoryLedger
from fttrain.model import liger
from fttrain.model.decoder import Architecture
from fttrain.optim.optimizer import check_available
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat
from fttrain.store import FrozenBase
from fttrain.store.loading import Progress
from fttrain.strategy import pipeline, replicate, shard, stream
from fttrain.strategy.context import BuildContext
from fttrain.strategy.protocol import Strategy
from fttrain.strategy.spec import StrategySpec
from fttrain.strategy.zero_checks import refuse_deepspeed_launch
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.util.errors import UserError

Show = Callable[[str], Progress]
CAPABILITY, MAX_HEAD_DIM = (8, 0), 256  # of flash attention's kernels on a GPU

NATIVE_PAGES: dict[str, Any] = {
    "replicate": replicate,
    "shard": shard,
    "stream": stream,
    "pipeline": pipeline,
}


def strategy_page(name: str) -> Any:
    """The module of a strategy, with ``reserve`` and ``build``. DeepSpeed's is loaded on demand."""
    if name == DEEPSPEED:
        from fttrain.strategy.deepspeed import page

        return page
    return NATIVE_PAGES[name]


def silent(title: str) -> Progress:
    """The progress of ranks other than 0: nothing is shown."""
    return lambda done, total: None


class StrategyBuilder:
    """A strategy with its memory reserved, before anything is loaded. Raises UserError for settings
    that contradict each other and for a machine that is too small.
    """

    def __init__(
        self,
        spec: StrategySpec,
        architecture: Architecture,
        frozen_format: FrozenFormat,
        group: RankGroup,
    ) -> None:
        if spec.strategy.name != DEEPSPEED:
            refuse_deepspeed_launch(spec.strategy.name, os.environ)
        if group.device.type == "cuda":
            _check_attention(spec.dtype, architecture.head_dim, group)
        if spec.strategy.name != DEEPSPEED:
            liger.use(spec.kernels, group.device)
        check_available(spec.optim)
        self._context = BuildContext(spec, group, architecture, frozen_format, MemoryLedger(group))
        self._page = strategy_page(spec.strategy.name)
        self._partition = self._page.reserve(self._context)
        self._context.ledger.check()

    def build(self, base: FrozenBase, progress: Progress) -> Strategy:
        """Load ``base`` and build the strategy around it, adapters at their initial values.

        ``progress(done, total)`` counts layers.
        """
        context = self._context
        with explain_out_of_memory(
            context.ledger.reservations, context.group.rank, context.group.device
        ):
            strategy: Strategy = self._page.build(context, base, self._partition, progress)
        return strategy


def _check_attention(dtype: str, head_dim: int, group: RankGroup) -> None:
    """Raise UserError, on every rank, where flash attention's GPU kernels do not take the model or
    the card.
    """
    if dtype == "float32":
        raise UserError("model.dtype=float32: flash attention on a GPU takes model.dtype=bfloat16")
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise UserError(
            f"the model's heads have {head_dim} values: flash attention on a GPU takes multiples "
            f"of 8 up to {MAX_HEAD_DIM}; rig.device=cpu or another model helps"
        )
    problem, capability = "", torch.cuda.get_device_capability(group.device)
    if capability < CAPABILITY:
        problem = (
            f"rank {group.rank}: {torch.cuda.get_device_name(group.device)} has compute capability "
            f"{capability[0]}.{capability[1]}, flash attention and bfloat16 need 8.0 (RTX 30) or "
            "newer; another card (CUDA_VISIBLE_DEVICES) or rig.device=cpu helps"
        )
    group.raise_everywhere(problem)


def frozen_base(source: Source, quant: QuantConfig, dtype: str) -> FrozenSpec:
    """The specification of the frozen base of a run.

    Raises UserError for a checkpoint that cannot be used with these settings.
    """
    check_quantisation(quantisation_of(source), quant)
    architecture = Architecture(load_config(source))
    return FrozenSpec(
        source, architecture, architecture.frozen_format(quant, getattr(torch, dtype))
    )


def build_strategy(
    spec: StrategySpec, source: Source, group: RankGroup, show: Show = silent
) -> tuple[Strategy, FrozenCache]:
    """The strategy, adapters at their initial values, and the frozen cache that it was loaded from.
    The cache is built first where there is none.

    ``show(title)`` gives the progress bar of a part. Raises UserError for a checkpoint that cannot
    be used and, before anything is loaded, for a machine that is too small.
    """
    base = frozen_base(source, spec.quant, spec.dtype)
    builder = StrategyBuilder(spec, base.architecture, base.frozen_format, group)
    quantising = show("quantising the frozen base")
    cache = open_or_build(base, spec.frozen.cache_dir, group, quantising)
    return builder.build(cache, show("loading the frozen base")), cache
