"""The training loop, as one would describe it.

Choose what the settings leave open and prepare the data, before the ranks meet; load the frozen
base; measure it on the held-out rows; take the steps, judging each loss before it becomes an update
and saving on the way; measure again; export the result and write a report.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fttrain.config.run_config import RunConfig, to_yaml
from fttrain.distributed.process_group import process_group
from fttrain.launcher.launch import require_ranks
from fttrain.optim.lr_schedule import learning_rate
from fttrain.rig.device_setup import set_up_rank
from fttrain.strategy.protocol import OutOfMemory, StepStats
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.track import Trackers
from fttrain.track.report import write_report
from fttrain.training.auto_plan import add_measured, resolve_auto, with_target_share, write_plan
from fttrain.training.checkpointing import lock_for_training, resume, save, snapshot_of_session
from fttrain.training.evaluation import Evaluation
from fttrain.training.export import export_result, usage
from fttrain.training.held_out import (
    add_to_history,
    measure_base_once,
    measure_tuned,
    write_evaluation,
)
from fttrain.training.inputs import prepare_inputs, rows_per_step
from fttrain.training.monitor import Monitor, results_of, session_trackers
from fttrain.training.session import TrainSession, build_session, describe, halve
from fttrain.training.stop_signals import StopSignals
from fttrain.util.errors import UserError
from fttrain.util.warn import warn

SPIKE_EXIT_CODE = 3


@dataclass(frozen=True)
class TrainResult:
    """The end of a training run, on one rank."""

    exit_code: int  # of a process that does nothing else: 0, or 130 / 143 after SIGINT / SIGTERM
    output: Path  # the folder of the run
    exported: Path | None  # folder of the adapter (or the model); None: the run was stopped
    steps: int  # optimizer steps done
    base_nll: float | None  # held-out loss, nats per token; None: not measured, or not finite
    tuned_nll: float | None  # likewise, after training


def train(config: RunConfig) -> TrainResult:
    """Train as ``config`` says. Every rank calls it; without a launcher this process is the only
    rank.

    Raises UserError, before anything is loaded where possible, and with exit code 3 when the loss
    runs away.
    """
    if config.dry_run:
        raise UserError(f"dry_run={config.dry_run}: training is no dry run; leave dry_run= out")
    require_ranks(config.launch)
    device = set_up_rank(config.rig, config.strategy.name == DEEPSPEED)
    config, plan = resolve_auto(config)
    inputs = prepare_inputs(config, rows_per_step(config))
    plan = with_target_share(config, plan, inputs.dataset.train.target_share)
    lock, ranks = lock_for_training(config), process_group(device, config.rig.backend)
    # Ranks that still wait for each other have nothing to save: a signal ends them at once.
    with lock, ranks as group, StopSignals() as signals:
        session = build_session(config, group, inputs)
        _start(session, plan)
        with session_trackers(session) as trackers:
            stopped = _take_steps(session, trackers, signals)
            exported = None if stopped else _finish(session)
            trackers.exit_code = signals.exit_code if stopped else 0
            if group.is_main:
                add_measured(session.output)
                print(f"report: {write_report(session.output)}")
                trackers.show(session.step, lambda: results_of(session))
        return _result(session, trackers.exit_code, exported)


def _start(session: TrainSession, plan: dict[str, Any] | None) -> None:
    """Describe the run, measure the base, and resume from a snapshot where there is one.

    A snapshot that does not fit is refused before anything is measured or written.
    """
    snapshot = snapshot_of_session(session)
    if session.group.is_main:
        (session.output / "config.yaml").write_text(to_yaml(session.config))
        write_plan(session.output, plan, snapshot[1].step if snapshot else 0)
        describe(session)
    session.evaluation = Evaluation.read(session.output)
    measure_base_once(session)
    if snapshot is not None:
        resume(session, *snapshot)
    session.evaluation.go_back(session.step)
    if session.evaluation.base is not None:
        write_evaluation(session)


def _take_steps(session: TrainSession, trackers: Trackers, signals: StopSignals) -> bool:
    """Take the steps that are left; True when a signal ended them early, on the same step on every
    rank.
    """
    config, total_steps = session.config, session.total_steps
    save_every, eval_every = config.checkpoint.every, config.loop.eval_every
    monitor = Monitor(session, trackers)
    while session.step < total_steps:
        lr = learning_rate(config.optim, session.step, total_steps)
        stats, step_s = take_step(session, lr)
        session.step += 1
        monitor.after_step(stats, lr, step_s)
        if eval_every and session.step % eval_every == 0 and session.step < total_steps:
            figures = session.holdout.loss(session.strategy)
            add_to_history(session, figures)
            trackers.log(session.step, {"holdout_nll": figures["nll"]})
            write_evaluation(session)
        # All ranks stop on the same step, for the same signal.
        signals.signum = int(session.group.maximum(signals.signum or 0)) or None
        ended = session.step == total_steps
        if signals.requested or ended or (save_every and session.step % save_every == 0):
            save(session)
        if signals.requested and not ended:
            session.say(f"stopped after step {session.step}; the same command goes on from there")
            return True
    return False


def take_step(session: TrainSession, lr: float) -> tuple[StepStats, float]:
    """One step and its seconds; where memory runs out, again with smaller micro-batches."""
    while True:
        started = time.perf_counter()
        try:
            stats = session.strategy.train_step(
                session.loader.next_step(),
                session.step,
                lr,
                lambda loss, grad_norm: _accept(session, loss, grad_norm),
            )
            return stats, time.perf_counter() - started
        except OutOfMemory as error:
            halve(session, error)


def _accept(session: TrainSession, loss: float, grad_norm: float) -> bool:
    """Whether a step becomes an update. Every rank sees the same figures and decides the same."""
    verdict = session.guard.observe(loss, grad_norm)
    if verdict.action == "stop":
        raise UserError(f"step {session.step + 1}: {verdict.message}", SPIKE_EXIT_CODE)
    if verdict.message:
        warn(f"step {session.step + 1}: {verdict.message}")
    return verdict.action == "ok"


def _finish(session: TrainSession) -> Path:
    """Measure the tuned model, export it, and say how to use it; the folder of the export."""
    if len(session.holdout.rows):
        measure_tuned(session)
        add_to_history(session, session.evaluation.tuned)
        write_evaluation(session)
    folder = export_result(session)
    session.say(f"\n{session.evaluation.summary()}\n\n{usage(session, folder)}")
    return folder


def _result(session: TrainSession, exit_code: int, exported: Path | None) -> TrainResult:
    base, tuned = (
        None if figures is None else figures["nll"]
        for figures in (session.evaluation.base, session.evaluation.tuned)
    )
    return TrainResult(exit_code, session.output, exported, session.step, base, tuned)
