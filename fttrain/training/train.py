"""The training loop, as one would describe it.

Choose what is left open, and prepare the data, before the ranks meet; load the frozen base; measure
it on what is held out; take the steps, judging each loss before it becomes an update and saving on
the way; measure again; leave what has trained, and a report.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from fttrain.checkpoint.output_lock import lock_output
from fttrain.config.run_config import RunConfig, to_yaml
from fttrain.data.dataset import Dataset, prepare
from fttrain.data.samples import HoldoutSample, holdout_samples
from fttrain.distributed.peer_watchdog import uninterruptible
from fttrain.distributed.process_group import process_group
from fttrain.distributed.rank_group import rank_from_environment
from fttrain.frozen.source import (
    Source,
    check_length,
    check_vocabulary,
    load_config,
    load_tokenizer,
    resolve,
)
from fttrain.launcher.launch import restarted
from fttrain.memory.host import peak_host_bytes
from fttrain.memory.sampling import peak_device_bytes
from fttrain.optim.lr_schedule import learning_rate
from fttrain.rig.device_setup import set_up_rank
from fttrain.rig.telemetry import card_watch, gather_samples
from fttrain.strategy.link_monitor import link_monitor
from fttrain.strategy.protocol import OutOfMemory, StepStats
from fttrain.track import Results, Trackers, open_trackers, read_results
from fttrain.track.report import write_report
from fttrain.training import evaluation
from fttrain.training.auto_plan import (
    add_measured,
    link_table,
    resolve_auto,
    with_target_share,
    write_plan,
)
from fttrain.training.checkpointing import resume, save, wanted_snapshot
from fttrain.training.evaluation import Evaluation
from fttrain.training.export import export_result
from fttrain.training.monitor import report_memory, sample_memory
from fttrain.training.session import TrainSession, build, describe, halve
from fttrain.training.stop_signals import StopSignals
from fttrain.util.errors import UserError

SPIKE_EXIT_CODE = 3


def train(config: RunConfig) -> int:
    """Train as ``config`` says, on this rank. Exit code: 0, or 130 / 143 after a signal.

    Raises UserError, before anything is loaded where possible, and with exit code 3 when the loss
    runs away.
    """
    device = set_up_rank(config.rig)
    config, plan = resolve_auto(config)
    source, tokenizer, dataset = prepare_inputs(config)
    plan = with_target_share(config, plan, dataset.train.target_share)
    output = Path(config.output)
    is_main = rank_from_environment()[0] == 0
    # Started anew, it goes on with what it has left, however it was to begin.
    wanted = "auto" if restarted() else config.resume
    claim = lock_output(output, wanted) if is_main else nullcontext()
    # Ranks that still wait for each other have nothing to save: a signal ends them at once.
    with claim, process_group(device, config.rig.backend) as group, StopSignals() as signals:
        run = build(config, group, output, source, tokenizer, dataset)
        _start(run, plan)
        with _trackers(run) as trackers:
            stopped = _take_steps(run, trackers, signals)
            if not stopped:
                _finish(run, source)
            trackers.exit_code = signals.exit_code if stopped else 0
            if group.is_main:
                add_measured(output)
                print(f"report: {write_report(output)}")
                trackers.show(run.step, lambda: _results(run))
        return trackers.exit_code


def prepare_inputs(config: RunConfig) -> tuple[Source, Any, Dataset]:
    """The checkpoint, its tokenizer, and the data set, made where it is not there yet.

    Raises UserError where they cannot be used, or not together.
    """
    source = resolve(config.model)
    tokenizer, tokenizer_id = load_tokenizer(config.model)
    check_vocabulary(tokenizer, load_config(source))
    check_length(config.data.seq_len, load_config(source))
    return source, tokenizer, prepare(config.data, tokenizer, tokenizer_id)


def _start(run: TrainSession, plan: dict[str, Any] | None) -> None:
    """Say what is about to happen, measure the base and go on from a snapshot, if there is one.

    A snapshot that does not fit is refused before anything is measured or written.
    """
    found = wanted_snapshot(run)
    if run.group.is_main:
        (run.output / "config.yaml").write_text(to_yaml(run.config))
        write_plan(run.output, plan, found[1].step if found else 0)
        describe(run)
    run.figures = Evaluation.read(run.output)
    # Rank 0 has the file; other machines may not see it.
    unmeasured = run.group.any(run.group.is_main and run.figures.base is None)
    if unmeasured and len(run.holdout.rows):
        _measure_base(run)
    if found is not None:
        resume(run, *found)
    run.figures.go_back(run.step)
    if run.figures.base is not None:
        _write_figures(run)


def _take_steps(run: TrainSession, trackers: Trackers, signals: StopSignals) -> bool:
    """The steps that are left. True when a signal ended them early, on the same step everywhere."""
    every, eval_every = run.config.checkpoint.every, run.config.loop.eval_every
    memory_every, first = run.config.track.memory_every, run.step
    watch = card_watch(run.group.device, run.config.frozen.cache_dir)
    links = link_monitor(run.group, run.config.frozen.cache_dir)
    while run.step < run.total_steps:
        lr = learning_rate(run.config.optim, run.step, run.total_steps)
        stats, step_s = take_step(run, lr)
        run.step += 1
        if run.step == first + 1:
            report_memory(run)
        if run.step % run.config.loop.log_every == 0 or run.step == run.total_steps:
            trackers.log(run.step, _metrics(run, stats, lr, step_s))
        if memory_every and (run.step % memory_every == 0 or run.step == run.total_steps):
            cards = gather_samples(run.group)
            trackers.log_memory(run.step, sample_memory(run), cards)
            slow = links.look(run.group, stats.traffic)
            for line in [*watch.look(cards), *([slow] if slow else [])]:
                run.say(f"warning: step {run.step}: {line}")
        if eval_every and run.step % eval_every == 0 and run.step < run.total_steps:
            nll = run.holdout.loss(run.strategy, run.say)["nll"]
            run.figures.history.append({"step": run.step, "nll": nll})
            trackers.log(run.step, {"holdout_nll": nll})
            _write_figures(run)
        # All ranks stop on the same step, for the same signal.
        signals.signum = int(run.group.maximum(signals.signum or 0)) or None
        stop = signals.requested
        if stop or run.step == run.total_steps or (every and run.step % every == 0):
            save(run)
        if stop and run.step < run.total_steps:
            run.say(f"stopped after step {run.step}; the same command goes on from there")
            return True
    return False


def take_step(run: TrainSession, lr: float) -> tuple[StepStats, float]:
    """One step and its seconds; where memory runs out, again with smaller micro-batches."""
    while True:
        started = time.perf_counter()
        try:
            stats = run.strategy.train_step(
                run.loader.next_step(), run.step, lr, lambda *seen: _judge(run, *seen)
            )
            return stats, time.perf_counter() - started
        except OutOfMemory as error:
            halve(run, error)


def _judge(run: TrainSession, loss: float, grad_norm: float) -> bool:
    """Whether a step becomes an update. Every rank sees the same figures and decides the same."""
    verdict = run.guard.observe(loss, grad_norm)
    if verdict.action == "stop":
        raise UserError(f"step {run.step + 1}: {verdict.message}", SPIKE_EXIT_CODE)
    if verdict.message:
        run.say(f"warning: step {run.step + 1}: {verdict.message}")
    return verdict.action == "ok"


def _metrics(run: TrainSession, stats: StepStats, lr: float, step_s: float) -> dict[str, Any]:
    """A line of metrics.jsonl. Every rank calls it."""
    return {
        "loss": stats.loss,
        "lr": lr,
        "grad_norm": stats.grad_norm,
        "updated": stats.updated,
        "micro_batch_size": run.loader.micro_batch_size,
        "epoch": run.step / run.loader.steps_per_epoch,
        "tokens": stats.tokens,
        "targets": stats.targets,
        "tokens_per_s": stats.tokens / step_s,
        "step_s": step_s,
        "sync_bytes": stats.sync.sync_bytes,
        "sync_s": stats.sync.sync_s,
        "sync_gb_per_s": stats.sync.sync_gb_per_s,
        **_over_ranks(run, stats),
    }


def _over_ranks(run: TrainSession, stats: StepStats) -> dict[str, float]:
    """What differs from rank to rank: bytes moved by all ranks together; seconds waited and peaks
    of the rank that has most of them.
    """
    update = stats.update
    moved = asdict(stats.traffic) | {
        "optim_bytes": update.optim_bytes,
        "optim_gather_bytes": update.optim_gather_bytes,
    }
    wait_s = moved.pop("wait_s")
    most = {
        "wait_s": wait_s,
        "sync_wait_s": stats.sync.wait_s,
        "optim_s": update.optim_s,
        "optim_wait_s": update.optim_wait_s,
        "peak_device_bytes": peak_device_bytes(run.group.device),
        "peak_host_bytes": peak_host_bytes(),
    }
    ranks = run.group.gather([float(value) for value in [*moved.values(), *most.values()]])
    columns = zip(*ranks, strict=True)  # moved comes first
    folded = {name: sum(next(columns)) for name in moved}
    folded |= {name: max(next(columns)) for name in most}
    return {
        name: int(value) if name.endswith("_bytes") else value for name, value in folded.items()
    }


def _measure_base(run: TrainSession) -> None:
    """Held-out loss and answers of the base: the adapter is still without effect."""
    run.say("measuring the base on the held-out rows")
    run.figures.base = run.holdout.loss(run.strategy, run.say)
    run.figures.history = [{"step": 0, "nll": run.figures.base["nll"]}]
    samples = _samples(run)
    answers = evaluation.answer(run.strategy, samples, run.tokenizer, run.say)
    run.figures.samples = [
        evaluation.SampleAnswer(sample.prompt, sample.reference, before)
        for sample, before in zip(samples, answers, strict=True)
    ]
    _write_figures(run)


def _finish(run: TrainSession, source: Source) -> None:
    """Held-out loss and answers of the tuned model, what has trained, and how to use it."""
    if len(run.holdout.rows):
        run.figures.tuned = run.holdout.loss(run.strategy, run.say)
        run.figures.history.append({"step": run.step, "nll": run.figures.tuned["nll"]})
        answers = evaluation.answer(run.strategy, _samples(run), run.tokenizer, run.say)
        for sample, after in zip(run.figures.samples, answers, strict=False):
            sample.after = after
        _write_figures(run)
    how_to_use = export_result(run, source)
    run.say(f"\n{run.figures.summary()}\n\n{how_to_use}")


def _samples(run: TrainSession) -> list[HoldoutSample]:
    return holdout_samples(run.config.data, run.dataset, run.tokenizer, run.config.loop.samples)


def _write_figures(run: TrainSession) -> None:
    if run.group.is_main:
        run.figures.write(run.output)


@contextmanager
def _trackers(run: TrainSession) -> Iterator[Trackers]:
    """Rank 0's trackers, finished whatever happens; the other ranks' do nothing."""
    trackers = Trackers()
    if run.group.is_main:
        shown = yaml.safe_load(to_yaml(run.config))  # as text: secrets are redacted
        trackers = open_trackers(run.config.track, run.output, run.total_steps, run.step, shown)
        trackers.show(run.step, lambda: _results(run))
    try:
        yield trackers
    except BaseException as error:
        trackers.exit_code = getattr(error, "exit_code", 1)
        raise
    finally:
        with uninterruptible:  # they limit their own time
            trackers.finish()


def _results(run: TrainSession) -> Results:
    return read_results(run.output, run.step, link_table(run.config, run.group.world_size))
