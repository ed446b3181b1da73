"""``fttrain evaluate output=DIR``: held-out loss and answers of the base and of the tuned model."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import yaml

from fttrain.config.run_config import RunConfig
from fttrain.launcher import launch
from fttrain.util import schema
from fttrain.util.errors import UserError


def run(config: RunConfig, argv: list[str]) -> int:
    """Evaluate the run in ``config.output`` and write its evaluation.json anew.

    The run's own config.yaml says how; groups named on the command line are taken from there, so
    that another data set or another rig can be asked for. Raises UserError when there is no run.
    """
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    config = _of_run(config, argv[1:])
    return _evaluate(config)


def _of_run(config: RunConfig, overrides: list[str]) -> RunConfig:
    """The run's settings, and over them what ``overrides`` name: a group, or one key of it."""
    file = Path(config.output) / "config.yaml"
    if not file.is_file():
        raise UserError(f"output={config.output}: no run is there (config.yaml is missing)")
    saved = schema.build(RunConfig, yaml.safe_load(file.read_text()))
    changed = {name: getattr(config, name) for name in ("output", "launch", "rig")}
    named = [override.lstrip("+").partition("=")[0].partition(".") for override in overrides]
    for group, _, key in sorted(named):  # a whole group before its keys
        if not hasattr(saved, group):
            raise UserError(f"{group}: evaluate takes the settings of the run, and single changes")
        value = getattr(config, group)
        if key:
            before = changed.get(group, getattr(saved, group))
            value = dataclasses.replace(before, **{key: getattr(value, key)})
        changed[group] = value
    return dataclasses.replace(saved, **changed)


def _evaluate(config: RunConfig) -> int:
    # Late: these load torch and transformers, and a launcher does without.
    from fttrain.checkpoint.output_lock import lock_output
    from fttrain.data.dataset import prepare
    from fttrain.data.samples import holdout_samples
    from fttrain.distributed.process_group import process_group
    from fttrain.distributed.rank_group import rank_from_environment
    from fttrain.frozen.source import load_tokenizer, resolve
    from fttrain.rig.device_setup import set_up_rank
    from fttrain.strategy.builder import build_strategy
    from fttrain.training.auto_plan import resolve_auto
    from fttrain.training.checkpointing import last_micro_batch_size
    from fttrain.training.evaluation import Evaluation, HoldOut, SampleAnswer, answer
    from fttrain.training.export import find_trained
    from fttrain.training.session import strategy_spec

    device = set_up_rank(config.rig)
    if config.left_open:  # as the command line may say
        config, _ = resolve_auto(config)
    output = Path(config.output)
    trained = find_trained(config)
    tokenizer, tokenizer_id = load_tokenizer(config.model)
    dataset = prepare(config.data, tokenizer, tokenizer_id)
    if not len(dataset.holdout):
        raise UserError(f"data.holdout={config.data.holdout}: nothing is held out to evaluate on")
    is_main = rank_from_environment()[0] == 0
    claim = lock_output(output, "auto") if is_main else nullcontext()
    with claim, process_group(device, config.rig.backend) as group:
        strategy, _ = build_strategy(strategy_spec(config), resolve(config.model), group)
        # Rank 0's, for other machines may not see the run's snapshots
        size = int(group.broadcast_str(str(last_micro_batch_size(config)) if group.is_main else ""))
        holdout = HoldOut(dataset.holdout, size, config.loop.halve_on_oom)
        samples = holdout_samples(config.data, dataset, tokenizer, config.loop.samples)
        figures = Evaluation.read(output)
        say: Callable[[str], None] = print if group.is_main else lambda text: None
        figures.base = holdout.loss(strategy, say)
        before = answer(strategy, samples, tokenizer, say)
        strategy.load_adapter_state(trained)
        figures.tuned = holdout.loss(strategy, say)
        after = answer(strategy, samples, tokenizer, say)
        figures.samples = [
            SampleAnswer(sample.prompt, sample.reference, *texts)
            for sample, *texts in zip(samples, before, after, strict=True)
        ]
        if group.is_main:
            figures.write(output)
            print(figures.summary())
    return 0
