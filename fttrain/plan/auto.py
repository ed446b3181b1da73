"""The choice for ``strategy=auto`` and ``activations=auto``, and the prediction for a run.

A plan stays in the cache. All ranks, a dry run, the run after it and a resumed run read the same
plan.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
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

_FILE = "plan.json"
# Fields of a config.json that no plan depends on; shipped configurations lack them
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
    """The input of a plan: a model, a configuration and a rig."""

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

    settings: dict[str, Any]  # fields of a RunConfig that a candidate changes: name -> value
    summary: str  # one line; "" where it does not fit
    problem: str  # why it does not fit; "" where it fits
    plan: dict[str, Any]  # content of the run's plan.json (track/plan.py)


def ranked(request: PlanRequest, progress: Progress) -> list[Candidate]:
    """Candidates that differ from the configuration in its open settings alone: the fastest that
    fits first, then those that do not fit, by missing bytes.

    Raises UserError for a rate that the rig's profile lacks.
    """
    rig, architecture = request.rig, request.architecture
    if not request.left_open:
        return [judge(request.spec, architecture, rig)]
    strategy_is_open = "strategy" in request.left_open
    return choose(_wanted(request), architecture, rig, progress, strategy_is_open)


def _wanted(request: PlanRequest) -> list[StrategySpec]:
    spec, left_open = request.spec, request.left_open
    every = list(candidates(spec, len(request.rig.cards)))
    if "strategy" not in left_open:
        placements = dict.fromkeys(candidate.placement for candidate in every)
        return [replace(spec, placement=placement) for placement in placements]
    if "activations" in left_open:
        return every
    activations = spec.placement.activations
    return [candidate for candidate in every if candidate.placement.activations == activations]


def choose_plan(request: PlanRequest, cache_dir: str | None, progress: Progress) -> ChosenPlan:
    """The first of ``ranked``, from the cache where the same request was planned before.

    Any number of ranks may call it at once: one plans, the others wait. ``cache_dir``: as
    frozen.cache_dir. Raises UserError for a rate that the rig's profile lacks.
    """

    def write(folder: Path) -> None:
        write_json(folder / _FILE, asdict(_plan(request, progress)))

    folder = load_or_build(
        cache_root(cache_dir), _key(request), write, kind="plans", setting="frozen.cache_dir"
    )
    return ChosenPlan(**json.loads((folder / _FILE).read_bytes()))


def check_fits(request: PlanRequest, chosen: ChosenPlan) -> None:
    """Raise UserError, with the figures, where no choice of the open settings fits."""
    if chosen.problem:
        open_settings = " ".join(f"{name}=auto" for name in request.left_open)
        raise UserError(
            f"{open_settings}: {request.model} does not fit {request.rig.name}; nearest is "
            f"{chosen.plan['ran']}: {chosen.problem}"
        )


def _plan(request: PlanRequest, progress: Progress) -> ChosenPlan:
    ranking = ranked(request, progress)
    best = ranking[0]
    stored = disk(request.spec, request.architecture, request.keep_last)
    plan = as_json(ranking, request.rig, request.model, stored, request.steps)
    plan["ran"] = best.settings
    ours = next(c for c in plan["candidates"] if c["settings"] == best.settings)
    ours["predicted"] = _predicted(best, request.rig)
    line = summary(best, request.rig, request.steps) if best.fits else ""
    return ChosenPlan(_settings(best.spec), line, best.reason, plan)


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


def _predicted(candidate: Candidate, rig: RigProfile) -> dict[str, float]:
    """Predicted figures under their names in metrics.jsonl; unknown ones are left out, such as the
    memory of a CPU's process before its first tensor.
    """
    if candidate.time is None:
        return {}
    figures: dict[str, float] = {
        "step_s": candidate.time.seconds,
        "tokens_per_s": candidate.time.tokens_per_s,
    }
    # A rank's resident memory includes the parts that ranks share.
    hosts = [sum(rank.host.values()) + sum(rank.shared.values()) for rank in candidate.memory]
    if rig.cards[0].kind != "cpu":
        figures["peak_device_bytes"] = max(rank.device_bytes for rank in candidate.memory)
        figures["peak_host_bytes"] = max(hosts)
        return figures
    overheads = [card.overhead_bytes for card in rig.cards]
    if None not in overheads:
        figures["peak_host_bytes"] = max(
            rank.device_bytes + host_bytes + (overhead or 0)
            for rank, host_bytes, overhead in zip(candidate.memory, hosts, overheads, strict=True)
        )
    return figures


def _key(request: PlanRequest) -> str:
    """A hash of everything that a plan depends on, the text of this program included."""
    text = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        text.update(file.read_bytes())
    config = request.architecture.config.to_dict()
    shape = {name: config[name] for name in sorted(config.keys() - SHAPELESS)}
    names = [field.name for field in fields(request) if field.name != "architecture"]
    settings = [getattr(request, name) for name in names]
    versions = (torch.__version__, transformers.__version__)
    meaning = repr((text.hexdigest(), shape, settings, versions))
    return hashlib.sha256(meaning.encode()).hexdigest()[:32]
