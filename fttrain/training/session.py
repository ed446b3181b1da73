"""One run: everything its parts share, how it is put together, described, and divided."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fttrain.checkpoint.adapter_peft import AdapterInfo
from fttrain.config.run_config import RunConfig
from fttrain.data.dataset import Dataset
from fttrain.data.loader import Loader, PackedRows
from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.source import Source
from fttrain.model import liger
from fttrain.model.attention_op import kernel_name
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.builder import build_strategy, silent
from fttrain.strategy.config import AUTO, StrategyConfig
from fttrain.strategy.protocol import OutOfMemory, Strategy
from fttrain.strategy.spec import StepSize, StrategySpec
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.track import counting
from fttrain.training.evaluation import Evaluation, HoldOut
from fttrain.training.spike_guard import SpikeGuard


@dataclass
class TrainSession:
    """What the parts of one run share."""

    config: RunConfig
    group: RankGroup
    output: Path
    strategy: Strategy
    tokenizer: Any
    dataset: Dataset
    loader: Loader
    holdout: HoldOut
    guard: SpikeGuard
    total_steps: int
    base_model: str
    base_digest: str  # of the frozen base's bytes
    step: int = 0  # optimizer steps done
    figures: Evaluation = dataclasses.field(default_factory=Evaluation)

    def say(self, text: str) -> None:
        """Rank 0 tells the user."""
        if self.group.is_main:
            print(text, flush=True)


def strategy_spec(config: RunConfig) -> StrategySpec:
    """What a strategy is built from; what is still to be chosen starts from ``replicate``."""
    loop, strategy, schedule = config.loop, config.strategy, config.schedule
    if strategy.name == AUTO:
        strategy, schedule = StrategyConfig(), ScheduleConfig()
    return StrategySpec(
        strategy,
        config.quant,
        config.lora,
        config.optim,
        schedule,
        config.placement,
        config.frozen,
        StepSize(loop.micro_batch_size, config.data.seq_len, loop.gradient_accumulation_steps),
        config.model.dtype,
        loop.seed,
        loop.z_loss,
        config.kernels,
    )


def build(
    config: RunConfig,
    group: RankGroup,
    output: Path,
    source: Source,
    tokenizer: Any,
    dataset: Dataset,
    rows: PackedRows | None = None,
) -> TrainSession:
    """Load the frozen base and make everything a run needs, at its start.

    ``config``: nothing is left open. ``rows``: to train on; None: the data set's.
    """
    assert not config.left_open
    _check_alike(config, group, dataset)
    show = counting if group.intra_node.is_main else silent
    strategy, cache = build_strategy(strategy_spec(config), source, group, show)
    loop = config.loop
    place, places = strategy.data_parallel
    loader = Loader(
        dataset.train if rows is None else rows,
        loop.micro_batch_size,
        loop.gradient_accumulation_steps * group.world_size // places,
        place,
        places,
        loop.seed,
    )
    return TrainSession(
        config,
        group,
        output,
        strategy,
        tokenizer,
        dataset,
        loader,
        HoldOut(dataset.holdout, loop.micro_batch_size, loop.halve_on_oom),
        SpikeGuard(loop.spike_policy, loop.spike_rise),
        loop.total_steps(loader.steps_per_epoch),
        source.name,
        cache.digest,
    )


def _check_alike(config: RunConfig, group: RankGroup, dataset: Dataset) -> None:
    """Raises UserError, on every rank, where machines would take different steps."""
    settings = {
        f"{section}.{key}": str(value)
        for section in ("strategy", "optim", "schedule", "loop", "quant", "lora", "placement")
        for key, value in dataclasses.asdict(getattr(config, section)).items()
    }
    settings["model.dtype"] = config.model.dtype
    settings["kernels"] = config.kernels
    settings["checkpoint.every"] = str(config.checkpoint.every)
    settings["track.memory_every"] = str(config.track.memory_every)
    settings["dry_run"] = str(config.dry_run)
    group.raise_where_nodes_differ(settings, "the same command on every machine helps")
    fingerprint = {"data fingerprint": dataset.fingerprint}
    group.raise_where_nodes_differ(fingerprint, "the same data and tokenizer on every machine help")


def describe(run: TrainSession) -> None:
    """What is about to happen, in a few lines."""
    config = run.config
    for line in run.dataset.report.lines():
        print(line)
    print(
        f"{config.model.name}, quant={config.quant.kind}, lora.r={config.lora.r}, "
        f"strategy={config.strategy.name} on "
        f"{run.group.world_size} rank(s) of {run.group.device.type}{_machines(run.group)}, "
        f"{_kernels(config, run.group)}\n"
        f"{run.total_steps} steps of {run.loader.rows_per_step} rows of up to "
        f"{config.data.seq_len} tokens -> {run.output}",
        flush=True,
    )


def _kernels(config: RunConfig, group: RankGroup) -> str:
    """Those that really run; DeepSpeed's layers have transformers' own, but for attention."""
    attention = kernel_name(group.device)
    if group.device.type == "cpu" or config.strategy.name == DEEPSPEED:
        return attention
    return f"{attention}; norms, rotary embedding and SwiGLU by {liger.name()}"


def _machines(group: RankGroup) -> str:
    machines = group.inter_node.world_size
    return f" on {machines} machines" if machines > 1 else ""


def halve(run: TrainSession, error: OutOfMemory) -> None:
    """Smaller micro-batches, and as many more of them in a step. Every rank calls it.

    Raises ``error`` where they have one row, or the settings say so.
    """
    divide(run, error.pieces(run.loader.micro_batch_size, run.config.loop.halve_on_oom))
    run.say(
        f"warning: step {run.step + 1}: {error.what}; it is taken again, and the run goes on, with "
        f"{split(run)} (put them into the configuration to start with them)"
    )


def divide(run: TrainSession, pieces: int) -> None:
    """Micro-batches with 1 / ``pieces`` of the rows from here on, as many times more in a step."""
    run.loader.divide(pieces)
    run.holdout.micro_batch_size = min(run.holdout.micro_batch_size, run.loader.micro_batch_size)
    run.loader.position = run.step  # the rows of a step that was not taken come again
    run.strategy.resize(pieces)


def split(run: TrainSession) -> str:
    """The settings that make micro-batches what they are now."""
    loop, size = run.config.loop, run.loader.micro_batch_size
    steps = loop.gradient_accumulation_steps * loop.micro_batch_size // size
    return f"loop.micro_batch_size={size} loop.gradient_accumulation_steps={steps}"


def adapter_info(config: RunConfig) -> AdapterInfo | None:
    """What, beside the tensors, makes the adapter; None where all weights train."""
    lora = config.lora
    if not lora.r:
        return None
    return AdapterInfo(
        lora.r,
        lora.lora_alpha,
        lora.lora_dropout,
        lora.target_modules,
        lora.use_rslora,
        lora.use_dora,
    )
