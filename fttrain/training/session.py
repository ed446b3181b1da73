"""A run put together: its parts, how they are built, described, and split into micro-batches."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fttrain.checkpoint.adapter_peft import AdapterInfo
from fttrain.config.run_config import RunConfig
from fttrain.data.dataset import Dataset
from fttrain.data.loader import Loader, PackedRows
from fttrain.distributed.rank_group import RankGroup
from fttrain.model import liger
from fttrain.model.attention_op import kernel_name
from fttrain.strategy.builder import build_strategy, silent
from fttrain.strategy.protocol import OutOfMemory, Strategy
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.track import counting
from fttrain.training.evaluation import Evaluation, HoldOut
from fttrain.training.inputs import RunInputs
from fttrain.training.spike_guard import SpikeGuard
from fttrain.util.warn import warn


@dataclass
class TrainSession:
    """The parts of one run, for everything that works on it: training, evaluation, dry run."""

    config: RunConfig  # nothing is left open
    group: RankGroup
    inputs: RunInputs
    strategy: Strategy
    loader: Loader
    holdout: HoldOut
    guard: SpikeGuard
    total_steps: int
    base_digest: str  # SHA-256 of the frozen base
    step: int = 0  # optimizer steps done
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output)

    def say(self, text: str) -> None:
        """Print ``text`` on rank 0."""
        if self.group.is_main:
            print(text, flush=True)


def build_session(
    config: RunConfig, group: RankGroup, inputs: RunInputs, rows: PackedRows | None = None
) -> TrainSession:
    """Load the frozen base and put a run together, at its first step. Every rank calls it.

    ``config``: nothing is left open. ``rows``: to train on, the data set's own by default. Raises
    UserError, on every rank, where nodes differ in settings or data; and where ``build_strategy``
    does.
    """
    assert not config.left_open
    _check_nodes_agree(config, group, inputs.dataset)
    show = counting if group.intra_node.is_main else silent
    strategy, cache = build_strategy(config.strategy_spec(), inputs.source, group, show)
    loop = config.loop
    replica, replicas = strategy.data_parallel
    loader = Loader(
        inputs.dataset.train if rows is None else rows,
        loop.micro_batch_size,
        loop.gradient_accumulation_steps * group.world_size // replicas,
        replica,
        replicas,
        loop.seed,
    )
    return TrainSession(
        config,
        group,
        inputs,
        strategy,
        loader,
        HoldOut(inputs.dataset.holdout, loop.micro_batch_size, loop.halve_on_oom),
        SpikeGuard(loop.spike_policy, loop.spike_rise),
        loop.total_steps(loader.steps_per_epoch),
        cache.digest,
    )


def _check_nodes_agree(config: RunConfig, group: RankGroup, dataset: Dataset) -> None:
    """Raise UserError, on every rank, where nodes would take different steps."""
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


def describe(session: TrainSession) -> None:
    """Print the data report, the settings that matter most and the size of the run; on rank 0."""
    config, group = session.config, session.group
    for line in session.inputs.dataset.report.lines():
        print(line)
    print(
        f"{config.model.name}, quant={config.quant.kind}, lora.r={config.lora.r}, "
        f"strategy={config.strategy.name} on "
        f"{group.world_size} rank(s) of {group.device.type}{_nodes(group)}, "
        f"{_kernels(config, group)}\n"
        f"{session.total_steps} steps of {session.loader.rows_per_step} rows of up to "
        f"{config.data.seq_len} tokens -> {session.output}",
        flush=True,
    )


def _kernels(config: RunConfig, group: RankGroup) -> str:
    """The kernels that really run. DeepSpeed's layers have transformers' own, except for
    attention.
    """
    attention = kernel_name(group.device)
    if group.device.type == "cpu" or config.strategy.name == DEEPSPEED:
        return attention
    return f"{attention}; norms, rotary embedding and SwiGLU by {liger.name()}"


def _nodes(group: RankGroup) -> str:
    nodes = group.inter_node.world_size
    return f" on {nodes} machines" if nodes > 1 else ""


def halve(session: TrainSession, error: OutOfMemory) -> None:
    """Halve the micro-batches and double their number in a step. Every rank calls it.

    Raises ``error`` where a micro-batch has one row, or where the settings forbid it.
    """
    divide(session, error.pieces(session.loader.micro_batch_size, session.config.loop.halve_on_oom))
    warn(
        f"step {session.step + 1}: {error.what}; it is taken again, and the run goes on, "
        f"with {split(session)} (put them into the configuration to start with them)"
    )


def divide(session: TrainSession, pieces: int) -> None:
    """Give micro-batches 1 / ``pieces`` of their rows, and a step ``pieces`` times as many."""
    session.loader.divide(pieces)
    session.holdout.micro_batch_size = min(
        session.holdout.micro_batch_size, session.loader.micro_batch_size
    )
    session.loader.position = session.step  # the rows of a step that was not taken come again
    session.strategy.resize(pieces)


def split(session: TrainSession) -> str:
    """The settings that describe the micro-batches as they are now."""
    loop, size = session.config.loop, session.loader.micro_batch_size
    steps = loop.gradient_accumulation_steps * loop.micro_batch_size // size
    return f"loop.micro_batch_size={size} loop.gradient_accumulation_steps={steps}"


def adapter_info(config: RunConfig) -> AdapterInfo | None:
    """The adapter's settings, which its files state; None where all weights train."""
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
