"""The dry run, ``fttrain train dry_run=N``: N examples through the whole path, to estimate a run.

Data, frozen base, strategy, steps, rank count and settings are those of the run. The run's folder
is neither read nor written. The caches stay, as those of the run would.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fttrain.config.run_config import RunConfig
from fttrain.data.excerpt import Excerpt
from fttrain.distributed.process_group import process_group
from fttrain.memory.host import peak_host_bytes
from fttrain.memory.sampling import peak_device_bytes
from fttrain.optim.lr_schedule import learning_rate
from fttrain.plan.cost import reference_price, references
from fttrain.rig.device_setup import set_up_rank
from fttrain.strategy.protocol import StepStats
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.track import Trackers, progress
from fttrain.training.auto_plan import resolve_auto
from fttrain.training.inputs import prepare_inputs
from fttrain.training.monitor import memory_uses, show_fullest
from fttrain.training.session import TrainSession, build_session
from fttrain.training.train import take_step
from fttrain.util.units import duration, gib
from fttrain.util.warn import warn

LONG_RUN_S, LONG_EPOCH_S = 12 * 3600.0, 6 * 3600.0  # longer ones get a warning
WAITING = 0.2  # share of the time spent waiting, from which on another strategy is advised
SMALL_R = 8


@dataclass(frozen=True)
class DryRunResult:
    """The measurements of a dry run, over all ranks, without the step that warms up."""

    examples: int  # a text that was longer than data.seq_len counts as its pieces
    tokens: int
    seconds: float
    waiting: float = 0.0  # share of the time that compute waited for transfers

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class TimeEstimate:
    """The seconds of the steps alone, without held-out losses, answers and saves."""

    epoch_s: float
    run_s: float


def dry_run(config: RunConfig) -> int:
    """Take ``config.dry_run`` examples through the run that ``config`` describes, and print how
    long all of it would take. Every rank calls it. Exit code 0.

    Raises UserError where the run would.
    """
    device = set_up_rank(config.rig, config.strategy.name == DEEPSPEED)
    config, _ = resolve_auto(config)
    inputs = prepare_inputs(config)
    excerpt = Excerpt(inputs.dataset.train, config.dry_run, config.loop.seed)
    with process_group(device, config.rig.backend) as group:
        session = build_session(config, group, inputs, excerpt)
        _report(session, _take_examples(session, excerpt))
    return 0


def estimate(trial: DryRunResult, epoch_tokens: int, epochs: float) -> TimeEstimate:
    """The time of a run with ``epoch_tokens`` tokens in a pass over the training rows, and
    ``epochs`` passes.
    """
    epoch_s = epoch_tokens / trial.tokens_per_s
    return TimeEstimate(epoch_s, epochs * epoch_s)


def warnings(times: TimeEstimate, helps: Sequence[str], rents: Sequence[str] = ()) -> list[str]:
    """The warning about a run that takes long, with advice (``helps``), and the costs of renting
    (``rents``); none where nothing takes long.
    """
    too_long = [
        f"{what} takes {took_s / 3600:.1f} hours, more than {limit_s / 3600:.0f}"
        for what, took_s, limit_s in (
            ("the run", times.run_s, LONG_RUN_S),
            ("an epoch", times.epoch_s, LONG_EPOCH_S),
        )
        if took_s > limit_s
    ]
    if not too_long:
        return []
    return [f"{'; '.join(too_long)}; what helps: {'; '.join(helps)}", *rents]


def rents(cards: Sequence[str], hours: float) -> list[str]:
    """The costs of renting, a line each: of the run's ``cards``, by name, for ``hours``; without
    cards, as on a CPU, the costs of pairs of cards an hour.
    """
    references_of_cards = [reference_price(name) for name in cards]
    prices = [price for price, _ in references_of_cards if price is not None]
    if cards and len(prices) == len(cards):
        return [
            f"renting {len(cards)} x {cards[0]} for {hours:.1f} hours: ${sum(prices) * hours:,.2f} "
            f"({references_of_cards[0][1]})"
        ]
    return [*references(), "how long the run takes on them: `fttrain plan rig.profile=2x4090`"]


def advice(config: RunConfig, waiting: float) -> list[str]:
    """Advice that makes this run shorter, the surest first. ``waiting``: as in ``DryRunResult``."""
    helps = []
    name, adapters = config.strategy.name, config.lora.r > 0
    if waiting > WAITING:
        other = "another strategy" if adapters else "a lower strategy.zero.stage"
        helps.append(
            f"{other}: {waiting:.0%} of the time goes into waiting for what strategy={name} moves"
        )
    elif adapters and name != "replicate":  # all weights train with DeepSpeed alone
        grouped = "" if config.schedule.kind == "grouped" else " schedule=grouped"
        helps.append(f"strategy=replicate{grouped} if the base fits each card")
    if not config.data.packing:
        helps.append("data.packing=true")
    if config.activations == "recompute":
        offload = "" if name == DEEPSPEED else " or offload"
        there = " with layer_inputs=device" if config.layer_inputs == "host" else ""
        helps.append(f"activations=keep{offload}{there} if memory allows (no second forward)")
    if config.loop.epochs > 1:
        helps.append(f"fewer passes than loop.epochs={config.loop.epochs:g}")
    if config.lora.r > SMALL_R:
        helps.append(f"a lower rank than lora.r={config.lora.r}")
    helps.append(
        "fewer or shorter examples (data.max_rows; a smaller data.seq_len with "
        "data.on_bad_row=truncate)"
    )
    return helps


def _take_examples(session: TrainSession, excerpt: Excerpt) -> DryRunResult:
    """Take all steps of the excerpt, after one that warms up. Every rank calls it."""
    steps = session.loader.steps_per_epoch
    session.say(f"dry run: {excerpt.documents} examples in {steps} step(s), after one to warm up")
    trackers = Trackers([progress(steps + 1)] if session.group.is_main else [])
    try:
        # The first step loads kernels and makes buffers: its time is not that of the others.
        stats, took_s = _step(session)
        trackers.log(1, _figures(stats, took_s))
        session.loader.position = session.step = 0
        tokens, all_s, wait_s = 0, 0.0, 0.0
        for step in range(steps):
            stats, took_s = _step(session)
            trackers.log(step + 2, _figures(stats, took_s))
            tokens, all_s = tokens + stats.tokens, all_s + took_s
            wait_s += stats.traffic.wait_s
    finally:
        trackers.finish()
    return DryRunResult(excerpt.documents, tokens, all_s, session.group.maximum(wait_s) / all_s)


def _step(session: TrainSession) -> tuple[StepStats, float]:
    """Take a step; its figures and its seconds, until the device is done with it."""
    start_s = time.perf_counter()
    stats, _ = take_step(
        session, learning_rate(session.config.optim, session.step, session.total_steps)
    )
    if session.group.device.type == "cuda":
        torch.cuda.synchronize(session.group.device)
    session.step += 1
    return stats, time.perf_counter() - start_s


def _figures(stats: StepStats, took_s: float) -> dict[str, float]:
    return {"loss": stats.loss, "tokens_per_s": stats.tokens / took_s}


def _report(session: TrainSession, trial: DryRunResult) -> None:
    """Print rates, peaks, the estimate and advice. Every rank calls it."""
    peaks = session.group.gather(
        [float(peak_device_bytes(session.group.device)), float(peak_host_bytes())]
    )
    device_bytes, host_bytes = map(max, zip(*peaks, strict=True))
    uses = memory_uses(session)
    loop, dataset = session.config.loop, session.inputs.dataset
    steps_per_epoch = -(-len(dataset.train) // session.loader.rows_per_step)
    steps = loop.total_steps(steps_per_epoch)
    epochs = steps / steps_per_epoch
    times = estimate(trial, dataset.train.tokens, epochs)
    session.say(
        f"{trial.examples:,} examples, {trial.tokens:,} tokens in {trial.seconds:.1f} s: "
        f"{trial.examples / trial.seconds:,.2f} samples/s, {trial.tokens_per_s:,.0f} tokens/s"
    )
    on_card = f"{gib(device_bytes)} on the card, " if device_bytes else ""
    session.say(f"peaks, of the rank with the most: {on_card}{gib(host_bytes)} of host memory")
    show_fullest(session, uses, "the dry run")
    session.say(
        f"estimate: {times.run_s / 3600:.2f} hours ({duration(times.run_s)}) for {steps:,} steps, "
        f"{epochs:.2f} epochs of {dataset.train.tokens:,} tokens; {times.epoch_s / 3600:.2f} hours "
        "an epoch; held-out losses, answers and saves come on top"
    )
    rows = trial.examples / max(1, len(dataset.train.document_tokens)) * len(dataset.train)
    if rows < session.loader.rows_per_step <= len(dataset.train):
        two_steps = 2 * session.loader.rows_per_step * trial.examples / rows
        warn(
            f"{trial.examples} examples do not fill one step of "
            f"{session.loader.rows_per_step} rows, so the rates are rough; "
            f"dry_run={-(-int(two_steps) // 10) * 10} fills two"
        )
    hours = times.run_s / 3600
    lines = warnings(times, advice(session.config, trial.waiting), rents(_cards(session), hours))
    if lines:
        warn(lines[0])
    for line in lines[1:]:
        session.say(line)
    session.say("nothing was saved; data and frozen base stay in their caches")


def _cards(session: TrainSession) -> list[str]:
    """The names of the ranks' cards, assumed to be like rank 0's; none on a CPU."""
    if session.group.device.type != "cuda":
        return []
    return [torch.cuda.get_device_name(session.group.device)] * session.group.world_size
