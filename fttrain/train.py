"""The training loop, as one would describe it.

Prepare the data before the ranks meet; load the frozen base; measure it on what is held out; take
the steps, judging each loss before it becomes an update and saving on the way; measure again; leave
the adapter and a report.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fttrain import evaluation
from fttrain.checkpoint.adapter import AdapterInfo, save_adapter
from fttrain.checkpoint.resume import (
    Snapshot,
    claim_output,
    find_snapshot,
    load_snapshot,
    save_snapshot,
)
from fttrain.checkpoint.source import Source, check_vocabulary, load_config, load_tokenizer, resolve
from fttrain.config import RunConfig, to_yaml
from fttrain.data.batch import MicroBatch
from fttrain.data.dataset import Dataset, prepare
from fttrain.data.loader import Loader, evaluation_batches
from fttrain.data.samples import Sample, holdout_samples
from fttrain.dist import Group, process_group, rank_from_environment
from fttrain.errors import UserError
from fttrain.evaluation import Evaluation
from fttrain.loop import SpikeGuard, StopSignals
from fttrain.model.attention_op import kernel_name
from fttrain.optim.factory import learning_rate
from fttrain.rig.probe import peak_device_bytes, peak_host_bytes, set_up
from fttrain.strategy.build import Recipe, build_strategy
from fttrain.strategy.protocol import StepStats, Strategy
from fttrain.track import Trackers, counting, open_trackers
from fttrain.track.report import write_report

SPIKE_EXIT_CODE = 3


@dataclass
class Run:
    """What the parts of one run share."""

    config: RunConfig
    group: Group
    output: Path
    strategy: Strategy
    tokenizer: Any
    dataset: Dataset
    loader: Loader
    guard: SpikeGuard
    total_steps: int
    base_model: str
    step: int = 0  # optimizer steps done
    figures: Evaluation = dataclasses.field(default_factory=Evaluation)

    def say(self, text: str) -> None:
        """Rank 0 tells the user."""
        if self.group.is_main:
            print(text, flush=True)


def train(config: RunConfig) -> int:
    """Train as ``config`` says, on this rank. Exit code: 0, or 130 / 143 after a signal.

    Raises UserError, before anything is loaded where possible, and with exit code 3 when the loss
    runs away.
    """
    rank, world_size, local_rank = rank_from_environment()
    device = set_up(config.rig, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    source = resolve(config.model)
    tokenizer, tokenizer_id = load_tokenizer(config.model)
    check_vocabulary(tokenizer, load_config(source))
    dataset = prepare(config.data, tokenizer, tokenizer_id)
    output = Path(config.output)
    claim = claim_output(output, config.resume) if rank == 0 else nullcontext()
    with claim, StopSignals() as signals, process_group(device) as group:
        run = _build(config, group, output, source, tokenizer, dataset)
        _start(run)
        with _trackers(run) as trackers:
            stopped = _take_steps(run, trackers, signals)
        if not stopped:
            _finish(run, source)
        if group.is_main:
            print(f"report: {write_report(output)}")
        return signals.exit_code if stopped else 0


def recipe(config: RunConfig) -> Recipe:
    """What a strategy is built from."""
    return Recipe(
        config.strategy,
        config.quant,
        config.lora,
        config.optim,
        config.schedule,
        config.activations,
        config.model.dtype,
        config.loop.seed,
    )


def _build(
    config: RunConfig, group: Group, output: Path, source: Source, tokenizer: Any, dataset: Dataset
) -> Run:
    loading = counting("loading the frozen base") if group.is_main else None
    strategy = build_strategy(recipe(config), source, group, loading)
    loop = config.loop
    loader = Loader(
        dataset.train,
        loop.micro_batch_size,
        loop.gradient_accumulation_steps,
        group.rank,
        group.world_size,
        loop.seed,
    )
    steps = max(1, round(loop.epochs * loader.steps_per_epoch))
    return Run(
        config,
        group,
        output,
        strategy,
        tokenizer,
        dataset,
        loader,
        SpikeGuard(loop.spike_policy, loop.spike_rise),
        min(steps, loop.max_steps or steps),
        str(source.folder),
    )


def _start(run: Run) -> None:
    """Say what is about to happen, measure the base and go on from a snapshot, if there is one."""
    if run.group.is_main:
        _describe(run)
    run.figures = Evaluation.read(run.output)
    if run.figures.base is None and len(run.dataset.holdout):
        _measure_base(run)
    _resume(run)


def _resume(run: Run) -> None:
    """Go on from the snapshot that ``resume`` asks for, if there is one."""
    found = (
        find_snapshot(run.output / "checkpoints", run.config.resume) if run.group.is_main else None
    )
    path = run.group.share(str(found) if found else "")
    if not path:
        return
    snapshot = load_snapshot(path)
    for key, now in _identity(run).items():
        before = snapshot.scalars.get(key)
        if before != now:
            raise UserError(
                f"resume={path}: {key} was {before} when it was saved and is {now} now, so the run "
                "would not go on where it stopped; restore the setting or the data, or give "
                "another output= to start afresh"
            )
    run.strategy.load_adapter_state(snapshot.adapter)
    run.strategy.load_optimizer_state(snapshot.optimizer)
    run.guard.restore(snapshot.scalars["guard"])
    run.step = run.loader.position = snapshot.step
    history = run.figures.history
    run.figures.history = [entry for entry in history if entry["step"] <= run.step]
    run.say(f"resuming after step {run.step} from {path}")


def _identity(run: Run) -> dict[str, Any]:
    """What must be the same before and after a resume for the data and the randomness to go on."""
    config = run.config
    return {
        "data fingerprint": run.dataset.fingerprint,
        "rows per step": run.loader.rows_per_step,
        "loop.seed": config.loop.seed,
        "model.name": config.model.name,
        "model.dtype": config.model.dtype,
        "quant.kind": config.quant.kind,
        "lora.r": config.lora.r,
        "lora.lora_alpha": config.lora.lora_alpha,
        "lora.use_rslora": config.lora.use_rslora,
        "lora.lora_dropout": config.lora.lora_dropout,
    }


def _take_steps(run: Run, trackers: Trackers, signals: StopSignals) -> bool:
    """The steps that are left. True when a signal ended them early, on the same step everywhere."""
    every, eval_every = run.config.checkpoint.every, run.config.loop.eval_every
    while run.step < run.total_steps:
        started = time.perf_counter()
        lr = learning_rate(run.config.optim, run.step, run.total_steps)
        stats = run.strategy.train_step(
            run.loader.next_step(), run.step, lr, lambda *seen: _judge(run, *seen)
        )
        run.step += 1
        if run.step % run.config.loop.log_every == 0 or run.step == run.total_steps:
            trackers.log(run.step, _metrics(run, stats, lr, time.perf_counter() - started))
        if eval_every and run.step % eval_every == 0 and run.step < run.total_steps:
            nll = evaluation.held_out_loss(run.strategy, _holdout(run))["nll"]
            run.figures.history.append({"step": run.step, "nll": nll})
            trackers.log(run.step, {"holdout_nll": nll})
            _write_figures(run)
        # All ranks stop on the same step, for the same signal.
        signals.signum = int(run.group.maximum(signals.signum or 0)) or None
        stop = signals.requested
        if stop or run.step == run.total_steps or (every and run.step % every == 0):
            _save(run)
        if stop and run.step < run.total_steps:
            run.say(f"stopped after step {run.step}; the same command goes on from there")
            return True
    return False


def _judge(run: Run, loss: float, grad_norm: float) -> bool:
    """Whether a step becomes an update. Every rank sees the same figures and decides the same."""
    verdict = run.guard.observe(loss, grad_norm)
    if verdict.action == "stop":
        raise UserError(f"step {run.step + 1}: {verdict.message}", SPIKE_EXIT_CODE)
    if verdict.message:
        run.say(f"warning: step {run.step + 1}: {verdict.message}")
    return verdict.action == "ok"


def _metrics(run: Run, stats: StepStats, lr: float, step_s: float) -> dict[str, Any]:
    return {
        "loss": stats.loss,
        "lr": lr,
        "grad_norm": stats.grad_norm,
        "updated": stats.updated,
        "epoch": run.step / run.loader.steps_per_epoch,
        "tokens": stats.tokens,
        "targets": stats.targets,
        "tokens_per_s": stats.tokens / step_s,
        "step_s": step_s,
        "gather_bytes": 0,
        "h2d_bytes": 0,
        "sync_bytes": stats.sync.sync_bytes,
        "sync_s": stats.sync.sync_s,
        "sync_gb_per_s": stats.sync.sync_gb_per_s,
        "wait_s": stats.sync.wait_s,
        "peak_device_bytes": peak_device_bytes(run.group.device),
        "peak_host_bytes": peak_host_bytes(),
    }


def _save(run: Run) -> None:
    """Rank 0 writes; the others wait, and all end together where the disk fails."""
    problem = ""
    if run.group.is_main:
        snapshot = Snapshot(
            run.step,
            run.strategy.adapter_state(),
            run.strategy.optimizer_state(),
            {**_identity(run), "guard": run.guard.state()},
            _adapter_info(run.config),
            run.base_model,
            run.config.model.revision,
        )
        try:
            save_snapshot(run.output / "checkpoints", snapshot, run.config.checkpoint.keep_last)
        except UserError as error:
            problem = str(error)
    problem = run.group.share(problem)
    if problem:
        raise UserError(problem)


def _adapter_info(config: RunConfig) -> AdapterInfo:
    lora = config.lora
    return AdapterInfo(
        lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules, lora.use_rslora
    )


def _measure_base(run: Run) -> None:
    """Held-out loss and answers of the base: the adapter is still without effect."""
    run.say("measuring the base on the held-out rows")
    run.figures.base = evaluation.held_out_loss(run.strategy, _holdout(run))
    run.figures.history = [{"step": 0, "nll": run.figures.base["nll"]}]
    samples = _samples(run)
    answers = evaluation.answer(run.strategy, samples, run.tokenizer)
    run.figures.samples = [
        evaluation.Answer(sample.prompt, sample.reference, before)
        for sample, before in zip(samples, answers, strict=True)
    ]
    _write_figures(run)


def _finish(run: Run, source: Source) -> None:
    """Held-out loss and answers of the tuned model, the adapter, and how to use it."""
    if len(run.dataset.holdout):
        run.figures.tuned = evaluation.held_out_loss(run.strategy, _holdout(run))
        run.figures.history.append({"step": run.step, "nll": run.figures.tuned["nll"]})
        answers = evaluation.answer(run.strategy, _samples(run), run.tokenizer)
        for sample, after in zip(run.figures.samples, answers, strict=False):
            sample.after = after
        _write_figures(run)
    if not run.group.is_main:
        return
    adapter = run.output / "adapter"
    save_adapter(
        adapter,
        run.strategy.adapter_state(),
        _adapter_info(run.config),
        run.base_model,
        run.config.model.revision,
    )
    print(f"\n{run.figures.summary()}")
    arguments = ", ".join(
        repr(value) if i == 0 else f"{key}={value!r}"
        for i, (key, value) in enumerate(source.pretrained_arguments.items())
    )
    print(
        f"\nadapter: {adapter}\nload it with plain PEFT:\n"
        f"  base = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"  model = PeftModel.from_pretrained(base, {str(adapter)!r})"
    )


def _holdout(run: Run) -> list[MicroBatch]:
    return evaluation_batches(
        run.dataset.holdout, run.config.loop.micro_batch_size, run.group.rank, run.group.world_size
    )


def _samples(run: Run) -> list[Sample]:
    return holdout_samples(run.config.data, run.dataset, run.tokenizer, run.config.loop.samples)


def _write_figures(run: Run) -> None:
    if run.group.is_main:
        run.figures.write(run.output)


def _describe(run: Run) -> None:
    """What is about to happen, in a few lines; and config.yaml."""
    (run.output / "config.yaml").write_text(to_yaml(run.config))
    config = run.config
    for line in run.dataset.report.lines():
        print(line)
    print(
        f"{config.model.name}, quant={config.quant.kind}, lora.r={config.lora.r}, "
        f"strategy={config.strategy.name} on "
        f"{run.group.world_size} rank(s) of {run.group.device.type}, "
        f"{kernel_name(run.group.device)}\n"
        f"{run.total_steps} steps of {run.loader.rows_per_step} rows of up to "
        f"{config.data.seq_len} tokens -> {run.output}",
        flush=True,
    )


@contextmanager
def _trackers(run: Run) -> Iterator[Trackers]:
    """Rank 0's trackers, finished whatever happens; the other ranks' do nothing."""
    trackers = Trackers()
    if run.group.is_main:
        shown = yaml.safe_load(to_yaml(run.config))  # as text: secrets are redacted
        trackers = open_trackers(run.config.track, run.output, run.total_steps, run.step, shown)
    try:
        yield trackers
    finally:
        trackers.finish()
