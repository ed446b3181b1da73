"""The plan of a run: memory and speed of every strategy on a rig, before anything is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fttrain.config.run_config import RunConfig
from fttrain.frozen.source import check_length
from fttrain.launcher.launch import ranks_wanted
from fttrain.model.decoder import Architecture
from fttrain.plan.architectures import planned_config
from fttrain.plan.choose import Candidate, candidates, choose
from fttrain.plan.cost import DiskNeed, disk, run_steps, training_rows
from fttrain.plan.rigs import find_rig
from fttrain.plan.table import as_json
from fttrain.rig.profile import RigProfile
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.util.errors import UserError


@dataclass(frozen=True)
class RunPlan:
    """The candidates for a run, with the model and the rig that they were judged for."""

    model: str
    rig: RigProfile
    architecture: Architecture
    candidates: list[Candidate]  # the fastest that fits first
    disk: DiskNeed
    steps: int | None  # of the whole run; None: not known
    documents: int | None  # the most in a row; None: not known, one is assumed

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return as_json(self.candidates, self.rig, self.model, self.disk, self.steps)


def plan(config: RunConfig) -> dict[str, Any]:
    """The plan of ``config`` for the rig that ``rig.profile`` names: the content of plan.json, with
    the candidates under "candidates", the fastest that fits first. Writes nothing; of a model
    config.json alone is downloaded.

    No candidate has ``fits`` where nothing fits. Raises UserError for a rig, a model or a strategy
    that cannot be planned.
    """
    return plan_run(config, lambda done, total: None).to_json()


def plan_run(config: RunConfig, progress: Callable[[int, int], None]) -> RunPlan:
    """The plan of ``config``. ``progress``: takes the number of candidates that are done, and of
    all. Raises UserError as ``plan`` does.
    """
    if config.strategy.name == DEEPSPEED:
        raise UserError(
            f"plan: strategy={DEEPSPEED}: what DeepSpeed takes is not computed; "
            "`fttrain train dry_run=20` measures it"
        )
    rig = find_rig(config.rig.profile, config.frozen.cache_dir, ranks_wanted(config.launch))
    model = planned_config(config.model)
    check_length(config.data.seq_len, model)
    spec, architecture, loop = config.strategy_spec(), Architecture(model), config.loop
    rows_per_step = loop.micro_batch_size * loop.gradient_accumulation_steps * len(rig.cards)
    rows = training_rows(config.model, config.data)
    count = documents = None
    if rows is not None:
        count, documents = len(rows), int(rows.row_documents.max(initial=1))
        share = rows.target_share
        spec = replace(spec, size=replace(spec.size, target_share=share, row_documents=documents))
    return RunPlan(
        config.model.name,
        rig,
        architecture,
        choose(list(candidates(spec, len(rig.cards))), architecture, rig, progress),
        disk(spec, architecture, config.checkpoint.keep_last),
        run_steps(loop.max_steps, loop.epochs, count, rows_per_step),
        documents,
    )
