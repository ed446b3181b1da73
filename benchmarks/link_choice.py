"""Whether a plan made from a measured link chooses what is really faster over it.

    python benchmarks/link_choice.py [--json FILE] [--mbit 50 1000]

Two ranks in network namespaces count as one machine with a link of a known rate between them (root
only). At each rate `fttrain measure` measures, shard and pipeline are planned from that, and both
are run. Micro-batches are small, so that what is sent shows. Where the privileges are missing it
says so and measures nothing.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import common
from harness import turns
from harness.measured import measured, model_settings, planned
from harness.netns import Veth, veth_pair
from harness.rank import run_rank
from harness.turns import native

from fttrain.rig.profile import bus_bytes_per_s
from fttrain.util.errors import UserError

USUAL = {  # with --quick
    "warmup": (1, 1),
    "steps": (3, 3),
    "turns": (3, 2),
    # As few as there are make a pipeline's bubble as long as it gets: half of its work.
    "gradient_accumulation_steps": (1, 1),
    "micro_batch_size": (1, 1),
}
WITHIN = 0.1
SIDES = (
    native("shard", {"name": "shard"}, {"micro_batch_group": "all"}),
    native("pipeline", {"name": "pipeline"}, {"kind": "one_f_one_b"}),
)


def main() -> None:
    """Measure, print, write."""
    parser = turns.parser((__doc__ or "").partition("\n\n")[0], USUAL)
    parser.add_argument("--mbit", type=float, nargs="+", default=[50.0, 1000.0])
    parser.add_argument("--link-s", type=float, default=20.0, help="as rig.link_s")
    arguments = turns.parse(parser, USUAL)
    if arguments.rank:
        run_rank(arguments.rank)
        return
    environment, started_s = common.environment(), time.time()
    try:
        with veth_pair() as link, turns.prepared(arguments, ["packed"]) as (work, folder):
            job = work.job | {"data": "packed", "steps": work.steps["packed"]}
            tokens = work.tokens("packed")[arguments.warmup :]
            settings = turns.settings(work, arguments)
            results = []
            for mbit in arguments.mbit:
                common.say(started_s, f"{mbit:g} Mbit/s")
                link.limit(mbit)
                results += at_rate(mbit, job, folder, link, arguments, tokens)
    except UserError as error:
        print(f"link_choice.py: nothing was measured: {error}", file=sys.stderr)
        return
    reached = goals(results)
    _show(results, settings, environment)
    common.show_goals(reached)
    common.write_json(
        arguments.json,
        {"environment": environment, "settings": settings, "results": results, "goals": reached},
    )


def at_rate(
    mbit: float, job: dict[str, Any], folder: Path, link: Veth, arguments: Any, tokens: list[int]
) -> list[dict[str, Any]]:
    """Each side at a rate of the link: planned and measured."""
    settings = [*model_settings(job), f"rig.link_s={arguments.link_s}"]
    rig = measured(link, folder, settings, arguments.threads)
    taken = turns.take_turns(
        SIDES,
        range(1, arguments.turns + 1),
        lambda side: common.run_ranks(__file__, job | side.settings, folder, link),
    )
    sent = rig.link().samples["send_recv"][-1]
    full = job["ranks"] * job["micro_batch_size"] * job["seq_len"]
    full *= job["gradient_accumulation_steps"]
    found = []
    for side in SIDES:
        time_of_plan = planned(job | side.settings, rig).time
        step_s = [
            seconds * full / count
            for turn in taken[side]
            for seconds, count in zip(turns.slowest_s(turn), tokens, strict=True)
        ]
        found.append(
            {
                "mbit": mbit,
                "side": side.name,
                "planned_step_s": time_of_plan.seconds,
                "limit": time_of_plan.limit,
                "reported_mbit": bus_bytes_per_s("send_recv", sent, 2) * 8 / 1e6,
                "measured_step_s": statistics.median(step_s),
                "step_s": step_s,
            }
        )
    return found


def goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At each rate the side that is planned to be faster is the faster one; rates differ in it."""
    reached, chosen = [], set()
    for mbit in dict.fromkeys(result["mbit"] for result in results):
        at = [result for result in results if result["mbit"] == mbit]
        planned_first = min(at, key=lambda result: result["planned_step_s"])
        faster = min(at, key=lambda result: result["measured_step_s"])
        chosen.add(planned_first["side"])
        values = {
            f"{r['side']}: planned / measured s": r["planned_step_s"] / r["measured_step_s"]
            for r in at
        }
        what = f"{mbit:g} Mbit/s: {planned_first['side']} is chosen and is the faster"
        reached.append({"goal": what, "values": values, "met": planned_first is faster})
        ratio = at[0]["reported_mbit"] / mbit
        what = f"{mbit:g} Mbit/s: `fttrain measure` reports it within 10 %"
        reached.append({"goal": what, "values": {"ratio": ratio}, "met": abs(ratio - 1) <= WITHIN})
    what = "the choice changes with the link"
    reached.append({"goal": what, "values": {}, "met": len(chosen) > 1})
    return reached


def _show(
    results: list[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any]
) -> None:
    rows = [
        [
            f"{result['mbit']:g}",
            result["side"],
            f"{result['planned_step_s']:.2f}",
            f"{result['measured_step_s']:.2f}",
            result["limit"],
        ]
        for result in results
    ]
    columns = ["Mbit/s", "side", "s a step, planned", "measured", "limit"]
    common.show(f"What a link chooses: {turns.described(settings)}", columns, rows, environment)


if __name__ == "__main__":
    main()
