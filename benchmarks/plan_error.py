"""How far off a plan is: predicted peak memory and seconds a step beside measured ones.

    python benchmarks/plan_error.py [--json FILE] [--quick] [--only TEXT ...]

`fttrain measure` measures this machine with the ranks and threads of the comparison, and the demo's
model on it. From that profile alone each configuration of the grid is planned; then it is run, and
what its ranks took is compared: resident memory above the interpreter with its libraries, and the
median step. A plan speaks of the most that a step may have, so the rows are full: text of the
demo's data, one document each, every token a target.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import common
from harness import turns
from harness.measured import measured, model_settings, planned
from harness.rank import run_rank
from harness.turns import Side, Turn, native
from peers.work import Document, Work

from fttrain.rig.profile import RigProfile, load_profile

USUAL = {  # with --quick
    "warmup": (1, 1),
    "steps": (2, 1),
    "turns": (2, 1),
    "gradient_accumulation_steps": (4, 2),
}
MEMORY_WITHIN, TIME_WITHIN = 0.1, 0.15


def lever(strategy: str, name: str = "", group: str | int = "all", **settings: Any) -> Side:
    """``settings``: of the placement; ``own``: of the strategy; ``job``: of others."""
    job, own = settings.pop("job", {}), settings.pop("own", {})
    schedule = {"kind": "one_f_one_b"} if strategy == "pipeline" else {"micro_batch_group": group}
    said = ", ".join(part for part in (f"group={group}" * (group != "all"), name) if part)
    return native(
        strategy + (f", {said}" if said else ""),
        {"name": strategy, **own},
        schedule,
        settings,
        **job,
    )


SIDES = (
    lever("replicate"),
    lever("replicate", group=1),
    lever("replicate", "keep", activations="keep"),
    lever("replicate", "keep", group=1, activations="keep"),
    lever("replicate", "offload", group=1, activations="offload"),
    lever("replicate", "layer_inputs=host", layer_inputs="host"),
    lever("replicate", "lm_head=quantized", lm_head="quantized"),
    lever("replicate", "optim.offload", job={"changes": {"optim": {"offload": True}}}),
    lever("replicate", "rows=8", job={"micro_batch_size": 8}),
    lever("shard"),
    lever("shard", group=1),
    lever("shard", "keep", group=1, activations="keep"),
    lever("stream"),
    lever("stream", group=1),
    lever("stream", "15 resident", own={"resident_layers": 15}),
    lever(
        "stream",
        "all on the host",
        layer_inputs="host",
        embedding="host",
        lm_head="host",
        job={"changes": {"optim": {"offload": True}}},
    ),
    lever("pipeline"),
    lever("pipeline", "keep", activations="keep"),
)
QUICK = ("fttrain replicate, keep", "fttrain shard", "fttrain pipeline")


@dataclass(frozen=True)
class Expected:
    """What a plan says of a configuration."""

    # By rank: what stands for its card, its own of the host, what ranks share; the process
    peak_bytes: list[int]
    step_s: float


def main() -> None:
    """Measure, print, write."""
    parser = turns.parser((__doc__ or "").partition("\n\n")[0], USUAL)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="sides with one of these in it")
    parser.add_argument("--link-s", type=float, default=10.0, help="as rig.link_s")
    parser.add_argument("--profile", metavar="FILE", help="instead of measuring the machine")
    arguments = turns.parse(parser, USUAL)
    if arguments.rank:
        run_rank(arguments.rank)
        return
    environment = common.environment()
    with turns.prepared(arguments, ["packed"]) as (work, folder):
        job = work.job | {
            "data": "packed",
            "steps": full_rows(work),
            "imports": [
                "fttrain.config.run_config",
                "fttrain.training.train",
            ],  # as `fttrain train`
        }
        rig = _rig(arguments, job, folder)
        jobs = {side: changed(job, side) for side in chosen_sides(arguments)}
        taken = turns.take_turns(
            list(jobs),
            range(1, arguments.turns + 1),
            lambda side: common.run_ranks(__file__, jobs[side], folder),
        )
        settings = turns.settings(work, arguments)
        results = [compared(side, expected(jobs[side], rig), taken[side]) for side in jobs]
    reached = goals(results)
    _show(results, settings, environment)
    common.show_goals(reached)
    common.write_json(
        arguments.json,
        {"environment": environment, "settings": settings, "results": results, "goals": reached},
    )


def _rig(arguments: argparse.Namespace, job: dict[str, Any], folder: Path) -> RigProfile:
    if arguments.profile:
        return load_profile(Path(arguments.profile))
    settings = [*model_settings(job), f"rig.link_s={arguments.link_s}"]
    return measured(common.Loopback(), folder, settings, arguments.threads)


def chosen_sides(arguments: argparse.Namespace) -> list[Side]:
    """In the order in which they take turns."""
    if arguments.quick and not arguments.only:
        return [side for side in SIDES if side.name in QUICK]
    words = arguments.only or [""]
    return [side for side in SIDES if any(word in side.name for word in words)]


def changed(job: dict[str, Any], side: Side) -> dict[str, Any]:
    """The job of ``side``; its micro-batches are made of as many whole ones as have its rows."""
    rows = job["micro_batch_size"]
    job = job | side.settings
    for group, changes in job.pop("changes", {}).items():
        job[group] = job[group] | changes
    if job["micro_batch_size"] != rows:
        joined = job["micro_batch_size"] // rows
        job["steps"] = [[_joined(rank, joined) for rank in step] for step in job["steps"]]
        job["gradient_accumulation_steps"] //= joined
    return job


def full_rows(work: Work) -> list[Any]:
    """The work's steps with its text in rows of one document, as long as a row may be; labels are
    the ids themselves.
    """
    seq_len = work.job["seq_len"]
    text = cycle(
        token
        for step in work.steps["packed"]
        for rank in step
        for rows in rank
        for row in rows
        for ids, _ in row
        for token in ids
    )

    def row() -> list[Document]:
        ids = list(islice(text, seq_len))
        return [(ids, ids)]

    return [
        [[[row() for _ in rows] for rows in rank] for rank in step] for step in work.steps["packed"]
    ]


def _joined(micro_batches: list[list[Any]], count: int) -> list[list[Any]]:
    starts = range(0, len(micro_batches), count)
    return [list(chain(*micro_batches[start : start + count])) for start in starts]


def expected(job: dict[str, Any], rig: RigProfile) -> Expected:
    """The plan of ``job`` on ``rig``."""
    verdict = planned(job, rig)
    assert verdict.time is not None, verdict.reason
    peaks = [
        own.device_bytes
        + sum(own.host.values())
        + sum(own.shared.values())
        + (card.overhead_bytes or 0)
        for own, card in zip(verdict.memory, rig.cards, strict=True)
    ]
    return Expected(peaks, verdict.time.seconds)


def compared(
    side: Side,
    plan: Expected,
    taken: Sequence[Turn],
) -> dict[str, Any]:
    """Predicted and measured figures of one configuration."""
    steps = [seconds for turn in taken for seconds in turns.slowest_s(turn)]
    ranks = range(len(taken[0]))
    peaks = [statistics.median(turn[rank]["peak_host_bytes"] for turn in taken) for rank in ranks]
    step_s = statistics.median(steps)
    predicted = [
        peak - taken[0][rank]["interpreter_bytes"] for rank, peak in enumerate(plan.peak_bytes)
    ]
    return {
        "side": side.name,
        "settings": side.settings,
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": peaks,
        "peak_error": max(
            (found / real - 1 for found, real in zip(predicted, peaks, strict=True)), key=abs
        ),
        "predicted_step_s": plan.step_s,
        "measured_step_s": step_s,
        "step_s": steps,
        "step_error": plan.step_s / step_s - 1,
    }


def goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, and what came out."""
    return [
        _goal("peak memory within 10 %", results, "peak_error", MEMORY_WITHIN),
        _goal("seconds a step within 15 %", results, "step_error", TIME_WITHIN),
    ]


def _goal(what: str, results: list[dict[str, Any]], name: str, within: float) -> dict[str, Any]:
    values = {result["side"]: result[name] for result in results}
    return {"goal": what, "values": values, "met": all(abs(v) <= within for v in values.values())}


def _show(
    results: list[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any]
) -> None:
    rows = [
        [
            result["side"],
            " / ".join(f"{size / 2**30:.3f}" for size in result["predicted_peak_bytes"]),
            " / ".join(f"{size / 2**30:.3f}" for size in result["measured_peak_bytes"]),
            f"{result['peak_error']:+.1%}",
            f"{result['predicted_step_s']:.2f}",
            f"{result['measured_step_s']:.2f}",
            f"{result['step_error']:+.1%}",
        ]
        for result in results
    ]
    columns = ["side", "GiB, predicted", "GiB, measured", "error"]
    columns += ["s a step, predicted", "measured", "error"]
    common.show(f"Plans on {turns.described(settings)}", columns, rows, environment)


if __name__ == "__main__":
    main()
