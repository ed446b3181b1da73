"""The planner's part in a run: it chooses the settings that are left open, before anything is
loaded, and plan.json holds the prediction beside the measurement.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fttrain.config.run_config import RunConfig
from fttrain.distributed.rank_group import local_world_size, rank_from_environment
from fttrain.frozen.source import check_length
from fttrain.model.decoder import Architecture
from fttrain.plan.architectures import planned_config
from fttrain.plan.auto import ChosenPlan, PlanRequest, check_fits, choose_plan
from fttrain.plan.choose import estimate_step
from fttrain.plan.rigs import MEASURED, find_rig
from fttrain.rig.measure_report import links_table
from fttrain.rig.profile import RigProfile, measured_profile_path
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.builder import silent
from fttrain.strategy.config import StrategyConfig
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.track import Table, counting, read_metrics
from fttrain.track import plan as track_plan
from fttrain.util import atomic_files, schema
from fttrain.util.errors import UserError
from fttrain.util.warn import warn

Plan = dict[str, Any]  # content of plan.json


def resolve_auto(config: RunConfig) -> tuple[RunConfig, Plan | None]:
    """``config`` with nothing left open, and on rank 0 the run's plan; None without a profile of
    its rig. Each of several nodes plans for its own ranks: traffic between nodes is in no plan.

    Every rank calls it, before there is a process group: a plan makes one of its own, of ranks that
    do not exist. Of the model at most config.json is downloaded. Raises UserError where something
    is left open and there is no profile, it has another number of cards, or nothing fits.
    """
    rank, world_size, _ = rank_from_environment()
    if config.strategy.name == DEEPSPEED:  # it has no plan
        return config, None
    ranks = local_world_size()
    if not config.left_open:
        return config, _plan_of_given(config, ranks) if rank == 0 else None
    asked = " ".join(f"{name}=auto" for name in config.left_open)
    try:
        rig = find_rig(config.rig.profile, config.frozen.cache_dir, ranks)
    except UserError as error:
        raise UserError(f"{asked} needs a rig's profile: {error}") from None
    if len(rig.cards) != ranks:
        raise UserError(
            f"{asked}: rig.profile={config.rig.profile} has {len(rig.cards)} card(s), the run "
            f"{ranks} rank(s) on a machine; as many ranks help, or `fttrain measure "
            f"launch.processes={ranks}`"
        )
    request = _request(config, rig)
    chosen = _choose(config, request)
    check_fits(request, chosen)
    if rank == 0:
        print(f"{asked}: {chosen.summary}", flush=True)
        if ranks != world_size:
            print(f"{asked}: the plan of one machine; links between machines are not in it")
    return _with_settings(config, chosen.settings), chosen.plan


def with_target_share(config: RunConfig, plan: Plan | None, target_share: float) -> Plan | None:
    """``plan`` with the time of a step for data with this ``target_share``, the share of its tokens
    that are targets. Without data a plan assumes that all are.
    """
    if plan is None or not (predicted := track_plan.candidate(plan)["predicted"]):
        return plan
    ranks = local_world_size()
    rig = find_rig(config.rig.profile, config.frozen.cache_dir, ranks, lambda text: None)
    request = _request(config, rig)
    size = replace(request.spec.size, target_share=target_share)
    time = estimate_step(replace(request.spec, size=size), request.architecture, rig)
    predicted |= {"step_s": time.seconds, "tokens_per_s": time.tokens_per_s}
    return plan


def write_plan(output: Path, plan: Plan | None, step: int) -> None:
    """Write plan.json of a run that starts, or goes on, after ``step``. Without a ``plan`` that of
    an earlier start is deleted: it may be of other settings.
    """
    path, before = output / track_plan.FILE, track_plan.read_plan(output)
    if plan is not None:
        same = before is not None and before["ran"] == plan["ran"]
        since_step = before["since_step"] if before is not None and same else step
        _write(path, {**plan, "since_step": since_step})
    elif before is not None:
        path.unlink()


def add_measured(output: Path) -> None:
    """Add the measured figures of the run to plan.json, if it has one."""
    plan = track_plan.read_plan(output)
    if plan is None:
        return
    lines = read_metrics(output / "metrics.jsonl")
    track_plan.candidate(plan)["measured"] = track_plan.measured(lines, plan["since_step"])
    _write(output / track_plan.FILE, plan)


def link_table(config: RunConfig, ranks: int) -> dict[str, Table]:
    """The table of the link rates of the run's rig, under "links"; empty where its profile has
    none.
    """
    try:
        rig = find_rig(config.rig.profile, config.frozen.cache_dir, ranks, lambda text: None)
    except UserError:
        return {}
    if not rig.links or len(rig.cards) != ranks:
        return {}
    report = links_table(rig)
    wrong = [[line, *("" for _ in rig.links)] for line in report.below.splitlines()]
    return {"links": Table(["figure", *report.columns[1:]], [*report.rows, *wrong])}


def _plan_of_given(config: RunConfig, ranks: int) -> Plan | None:
    """The plan of settings of which none is left open. Where they do not fit there is a warning and
    the run goes on: the stores' own refusals are exact.
    """
    cache_dir, profile = config.frozen.cache_dir, config.rig.profile
    if profile == MEASURED and measured_profile_path(cache_dir, ranks) is None:
        return None
    try:
        rig = find_rig(profile, cache_dir, ranks)
        if len(rig.cards) != ranks:
            return None
        chosen = _choose(config, _request(config, rig))
    except UserError as error:
        warn(f"the run is not planned: {error}")
        return None
    if chosen.problem:
        warn(
            f"by its plan this run does not fit {rig.name}: {chosen.problem}; "
            "`fttrain plan` with the same settings says what does"
        )
    return chosen.plan


def _choose(config: RunConfig, request: PlanRequest) -> ChosenPlan:
    show = counting if config.left_open else silent  # many candidates, or one
    return choose_plan(request, config.frozen.cache_dir, show("planning"))


def _request(config: RunConfig, rig: RigProfile) -> PlanRequest:
    model = planned_config(config.model)
    check_length(config.data.seq_len, model)
    return PlanRequest(
        config.model.name,
        config.strategy_spec(),
        Architecture(model),
        rig,
        config.left_open,
        config.checkpoint.keep_last,
        config.loop.max_steps,
    )


def _with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """``config`` with the chosen ``settings``, checked as if a user had written them."""
    activations = schema.convert(str | tuple[str, ...], settings["activations"], "activations")
    return replace(
        config,
        strategy=schema.build(StrategyConfig, settings["strategy"], "strategy"),
        schedule=schema.build(ScheduleConfig, settings["schedule"], "schedule"),
        loop=replace(config.loop, **settings["loop"]),
        activations=activations,
        layer_inputs=settings["layer_inputs"],
    )


def _write(path: Path, plan: Plan) -> None:
    atomic_files.replace(path, lambda part: atomic_files.write_json(part, plan))
