"""What ``strategy=auto`` and ``activations=auto`` become, and what is foretold of a run.

An answer is kept in the cache: it is made once, and all ranks, a dry run, the run after it and the
same run as it goes on take the same one.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from fttrain.model.decoder import Architecture
from fttrain.plan.choose import Candidate, Progress, candidates, choose, judge
from fttrain.plan.cost import disk
from fttrain.plan.table import as_json, summary
from fttrain.rig.profile import RigProfile
from fttrain.strategy.spec import StrategySpec
from fttrain.util.atomic_files import write_json
from fttrain.util.cache_dir import cache_root, load_or_build
from fttrain.util.errors import UserError

_FILE = "answer.json"
# Fields of a config.json that no plan depends on: a shipped one lacks them, the model's own may not
SHAPELESS = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "pretraining_tp",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class PlanRequest:
    """What is planned, and for which rig."""

    model: str  # for messages
    spec: StrategySpec  # the configuration's
    architecture: Architecture
    rig: RigProfile
    left_open: tuple[str, ...]  # as ``RunConfig.left_open``
    keep_last: int  # snapshots, as checkpoint.keep_last
    steps: int | None = None  # of the whole run, None: not known


@dataclass(frozen=True)
class ChosenPlan:
    """The candidate to run, as plain values."""

    settings: dict[str, Any]  # of a RunConfig, what a candidate changes: name -> value
    summary: str  # in one line; empty: it does not fit
    problem: str  # why it does not fit; empty: it does
    plan: dict[str, Any]  # content of the run's plan.json, see track/plan.py


def ranked(question: PlanRequest, progress: Progress) -> list[Candidate]:
    """Candidates that are as configured but for what is left open; the fastest that fits first,
    then those that do not fit, by what they lack.

    Raises UserError for a rate that the rig's profile lacks.
    """
    rig, architecture = question.rig, question.architecture
    if not question.left_open:
        return [judge(question.spec, architecture, rig)]
    strategy_is_open = "strategy" in question.left_open
    return choose(_wanted(question), architecture, rig, progress, strategy_is_open)


def _wanted(question: PlanRequest) -> list[StrategySpec]:
    spec, left_open = question.spec, question.left_open
    every = list(candidates(spec, len(question.rig.cards)))
    if "strategy" not in left_open:
        placements = dict.fromkeys(candidate.placement for candidate in every)
        return [replace(spec, placement=placement) for placement in placements]
    if "activations" in left_open:
        return every
    kept = spec.placement.activations
    return [candidate for candidate in every if candidate.placement.activations == kept]


def choose_plan(question: PlanRequest, cache_dir: str | None, progress: Progress) -> ChosenPlan:
    """The first of ``ranked``, from the cache where the same was asked before.

    Any number of ranks may ask at once: one plans, the others wait. ``cache_dir``: as
    frozen.cache_dir. Raises UserError for a rate that the rig's profile lacks.
    """

    def write(folder: Path) -> None:
        write_json(folder / _FILE, asdict(_answer(question, progress)))

    folder = load_or_build(
        cache_root(cache_dir), _key(question), write, kind="plans", setting="frozen.cache_dir"
    )
    return ChosenPlan(**json.loads((folder / _FILE).read_bytes()))


def check_fits(question: PlanRequest, found: ChosenPlan) -> None:
    """Raises UserError, with the figures, where nothing of what is left open fits."""
    if found.problem:
        asked = " ".join(f"{name}=auto" for name in question.left_open)
        raise UserError(
            f"{asked}: {question.model} does not fit {question.rig.name}; nearest is "
            f"{found.plan['ran']}: {found.problem}"
        )


def _answer(question: PlanRequest, progress: Progress) -> ChosenPlan:
    verdicts = ranked(question, progress)
    best = verdicts[0]
    stored = disk(question.spec, question.architecture, question.keep_last)
    plan = as_json(verdicts, question.rig, question.model, stored, question.steps)
    plan["ran"] = best.settings
    ours = next(c for c in plan["candidates"] if c["settings"] == best.settings)
    ours["predicted"] = _predicted(best, question.rig)
    said = summary(best, question.rig, question.steps) if best.fits else ""
    return ChosenPlan(_settings(best.spec), said, best.reason, plan)


def _settings(spec: StrategySpec) -> dict[str, Any]:
    return {
        "strategy": asdict(spec.strategy),
        "schedule": asdict(spec.schedule),
        "activations": spec.placement.activations,
        "layer_inputs": spec.placement.layer_inputs,
        "loop": {
            "micro_batch_size": spec.size.micro_batch_size,
            "gradient_accumulation_steps": spec.size.gradient_accumulation_steps,
        },
    }


def _predicted(verdict: Candidate, rig: RigProfile) -> dict[str, float]:
    """What metrics.jsonl will say, under the names that it has there; what is not known is left
    out: on a CPU, for one, what a process takes before its first tensor.
    """
    if verdict.time is None:
        return {}
    found: dict[str, float] = {
        "step_s": verdict.time.seconds,
        "tokens_per_s": verdict.time.tokens_per_s,
    }
    # A rank's resident memory has what it shares with others, too.
    host = [sum(own.host.values()) + sum(own.shared.values()) for own in verdict.memory]
    if rig.cards[0].kind != "cpu":
        found["peak_device_bytes"] = max(own.device_bytes for own in verdict.memory)
        found["peak_host_bytes"] = max(host)
        return found
    before = [card.overhead_bytes for card in rig.cards]
    if None not in before:
        found["peak_host_bytes"] = max(
            own.device_bytes + own_host + (first or 0)
            for own, own_host, first in zip(verdict.memory, host, before, strict=True)
        )
    return found


def _key(question: PlanRequest) -> str:
    """Changes with everything that an answer depends on, this program's own text included."""
    text = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        text.update(file.read_bytes())
    config = question.architecture.config.to_dict()
    shape = {name: config[name] for name in sorted(config.keys() - SHAPELESS)}
    names = [field.name for field in fields(question) if field.name != "architecture"]
    asked = [getattr(question, name) for name in names]
    versions = (torch.__version__, transformers.__version__)
    meaning = repr((text.hexdigest(), shape, asked, versions))
    return hashlib.sha256(meaning.encode()).hexdigest()[:32]
