"""Llama-3-70B on two cards of 24 GB: does it fit, how fast is it, how long may a row be?

    python benchmarks/fit70b.py [--json FILE] [--longest] [--only shard pipeline] [--levers]
    python benchmarks/fit70b.py --accumulation 1 --steps 2 --longest --total-s 540   # ten minutes
    python benchmarks/fit70b.py --tflops 71 --link-gb-s 12    # a datacentre GPU as a consumer card
    python benchmarks/fit70b.py --shape tiny --device cpu     # a smoke run

The model's exact shape with random NF4 bytes, made directly in the stores: nothing is downloaded.
Two ranks, each with torch's allocator capped such that it and the context stay within --cap-gib,
train r=16 on all linears for some real optimizer steps, each strategy at several accumulations,
each in processes of its own; rows that are longer come after all of these. ``out of memory`` and
``refused`` are answers, not errors; a run that fails or goes beyond its time limit is named and
makes the exit code 1, after all others have run. The JSON is written after each run, and of one
that ran out of time it has the steps that were made. --total-s is for all of it: what it leaves no
time for is ``not run``.

``--tflops`` leaves the compute a share of the multiprocessors, ``--link-gb-s`` paces the copies of
side streams between host and card, each way: what offloading gives depends on how fast these are.
Both are measured before the first run, without the limits and under them.

Two ranks may share one GPU. NCCL then takes them only as if on two hosts and over sockets: seconds
waited and tokens/s mean nothing for a rig (the table says so), memory does. --backend gloo does
without NCCL, through host memory.
"""

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from harness.fit_goals import NOT_RUN, TIME_LIMIT, goals
from harness.fit_limits import UNLIMITED, described, settle
from harness.fit_rank import OUT_OF_MEMORY, REFUSED, reason, run_rank
from harness.fit_report import CARD_GIB, show
from harness.fit_sides import SHAPES, Side, chosen_sides, usual_sides

from fttrain.launcher.accelerate_yaml import read_env
from fttrain.rig.config import BACKENDS
from fttrain.util.errors import UserError
from fttrain.util.paths import launch_folder
from fttrain.util.units import duration

# Times --seq-len, in search of the longest row. The fifth is tried first: 16384 tokens, the goal
LONGER = (2, 3, 4, 6, 8, 12, 16, 24)
LEAST_S = 30  # in less time a 70B model is not even loaded
LAUNCH_FILE = "2x3090_pcie.env"  # a rig's settings, as they ship
ALLOCATOR = "PYTORCH_ALLOC_CONF"
# A copy that waits must not hold up another stream's work: streams share 8 queues by default.
QUEUES = ("CUDA_DEVICE_MAX_CONNECTIONS", "32")
OUTCOMES: dict[object, str] = {  # by exit code
    OUT_OF_MEMORY: "out of memory",
    REFUSED: "refused",
    128 + signal.SIGALRM: TIME_LIMIT,
}
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # by the user: nothing is to follow

Result = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    if arguments.rank:
        run_rank(arguments.rank)
        return
    if arguments.gauge:
        from harness.fit_gauge import run_gauge  # imports what a rank counts as its own

        run_gauge(arguments.gauge)
        return
    sides = chosen_sides(arguments.shape, arguments.only, arguments.levers)
    _set_environment(arguments)
    environment = common.environment()
    started_s = time.time()
    limits = _limits(arguments, started_s)
    settings = vars(arguments) | {"allocator": os.environ.get(ALLOCATOR), "limits": limits}
    results: list[Result] = []
    figures: dict[str, Any] = {
        "environment": environment,
        "settings": settings,
        "results": results,
        "goals": [],
    }
    usual = [side.name for side in usual_sides(arguments.shape)]
    common.write_json(arguments.json, figures)
    for _ in measure(arguments, sides, limits, started_s, results):
        figures["goals"] = goals(results, settings, usual)
        common.write_json(arguments.json, figures)
    show(results, settings, environment)
    common.show_goals(figures["goals"])
    runs = [run for result in results for run in (result, *result.get("tries", []))]
    sys.exit(int(any(run["outcome"] in ("failed", TIME_LIMIT) for run in runs)))


def measure(
    arguments: argparse.Namespace,
    sides: list[Side],
    limits: dict[str, Any] | None,
    started_s: float,
    results: list[Result],
) -> Iterator[None]:
    """Adds to ``results``; comes back after each run. ``limits``: as ``settle`` has them."""
    names = ("device", "backend", "cap_gib", "steps", "ranks", "threads", "limit_s", "total_s")
    usual = {name: getattr(arguments, name) for name in names} | {"started_s": started_s}
    usual["shape"] = SHAPES[arguments.shape]
    usual["limits"] = limits["limits"] if limits else UNLIMITED
    searches: list[Iterator[None]] = []  # for longer rows, of what fits at the first accumulation
    for accumulation in arguments.accumulation:
        for side in sides:
            what = {"side": f"{side.name}, accumulation {accumulation}"}
            what |= {"accumulation": accumulation, **side.settings}
            job = usual | what
            result = {"name": side.name, **what, **run(job | {"seq_len": arguments.seq_len})}
            results.append(result)
            yield
            first = accumulation == arguments.accumulation[0]
            if arguments.longest and first and result["outcome"] == "fits":
                searches.append(longer_rows(result, job | {"steps": 1}))
    yield from in_turns(searches)


def in_turns(searches: list[Iterator[None]]) -> Iterator[None]:
    """A run of each, then the next of each: what matters most of all sides is known first."""
    while searches:
        for own in list(searches):
            try:
                yield next(own)
            except StopIteration:
                searches.remove(own)


def longer_rows(result: Result, job: dict[str, Any]) -> Iterator[None]:
    """Adds what was tried to a ``result``; comes back after each run."""
    result["tries"] = []
    lengths = [int(times * result["seq_len"]) for times in LONGER]
    for attempt in search(lengths, lambda seq_len: run(job | {"seq_len": seq_len})):
        result["tries"].append(attempt)
        yield


def search(lengths: list[int], run: Callable[[int], Result]) -> Iterator[Result]:
    """Runs with those of ``lengths``, which ascend, that narrow down the longest that fits: 4 of 8.

    What does not end in time counts as if it did not fit; where there is no time left it ends.
    """
    fitting, too_long = 0, len(lengths)  # lengths[:fitting] fit, lengths[too_long:] do not
    while fitting < too_long:
        middle = (fitting + too_long) // 2
        result = run(lengths[middle])
        yield result
        if result["outcome"] == NOT_RUN:
            return
        if result["outcome"] == "fits":
            fitting = middle + 1
        else:
            too_long = middle


def run(job: dict[str, Any]) -> Result:
    """What came of a job, in processes of its own, and what its ranks reported."""
    what = f"{job['side']}, T={job['seq_len']}"
    began, left_s = time.time(), _left_s(job)
    if left_s < LEAST_S:
        common.say(job["started_s"], f"{what}: {NOT_RUN}, --total-s leaves {left_s:.0f} s")
        return _result(job, NOT_RUN, "", 0.0, [])
    limit_s = min(job["limit_s"], left_s)
    common.say(job["started_s"], f"{what}: {job['steps']} steps, {duration(limit_s)} at most")
    outcome = "fits"
    with tempfile.TemporaryDirectory(prefix="fttrain-fit-") as name:
        folder, own = Path(name), job | {"ends_s": began + limit_s}
        try:
            ranks = common.run_ranks(str(Path(__file__).resolve()), own, folder)
        except SystemExit as failure:
            if failure.code in STOPPED:
                raise
            outcome = OUTCOMES.get(failure.code, "failed")
            ranks = common.reports(folder, job["ranks"]) if outcome == TIME_LIMIT else []
        why = reason(folder)
    wall_s = time.time() - began
    ended = f"{outcome}: {why}" if why else outcome
    common.say(job["started_s"], f"{what}: after {duration(wall_s)}: {ended}")
    return _result(job, outcome, why, wall_s, ranks)


def _left_s(job: dict[str, Any]) -> float:
    """Of the time for all runs."""
    if job["total_s"] is None:
        return math.inf
    return float(job["started_s"] + job["total_s"] - time.time())


def _result(
    job: dict[str, Any], outcome: str, why: str, wall_s: float, ranks: list[dict[str, Any]]
) -> Result:
    return {
        "seq_len": job["seq_len"],
        "outcome": outcome,
        "reason": why,
        "wall_s": wall_s,
        "ranks": ranks,
    }


def _limits(arguments: argparse.Namespace, started_s: float) -> dict[str, Any] | None:
    """What ``settle`` finds for those that were asked for; None: for none."""
    tflops, link_gb_s = arguments.tflops, arguments.link_gb_s
    if tflops is None and link_gb_s is None:
        return None
    usual = {"device": arguments.device, "threads": arguments.threads, "ranks": 1}
    script = str(Path(__file__).resolve())

    def measured(limits: dict[str, Any]) -> dict[str, Any]:
        common.say(started_s, "measuring this machine's rates")
        with tempfile.TemporaryDirectory(prefix="fttrain-fit-") as folder:
            job = usual | {"limits": limits, "ends_s": time.time() + arguments.limit_s}
            return common.run_ranks(script, job, Path(folder), option="--gauge")[0]

    try:
        found = settle(tflops, link_gb_s, measured)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    common.say(started_s, described(found))
    return found


def _set_environment(arguments: argparse.Namespace) -> None:
    """For all processes that follow. What the user has set wins."""
    if arguments.device == "cuda":
        os.environ.setdefault(ALLOCATOR, read_env(launch_folder() / LAUNCH_FILE)[ALLOCATOR])
    if arguments.link_gb_s is not None:
        os.environ.setdefault(*QUEUES)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--shape", choices=SHAPES, default="llama3_70b")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--backend", choices=BACKENDS, default="auto", help="as rig.backend")
    add("--cap-gib", type=float, default=CARD_GIB, help="of each rank, context included")
    add("--seq-len", type=int, default=2048)
    add("--steps", type=int, default=5)
    add("--accumulation", type=int, nargs="+", default=[1, 8])
    add("--only", nargs="+", metavar="TEXT", help="sides of this name, or with it in their name")
    add("--levers", action="store_true", help="also the usual sides with one lever pulled")
    add("--longest", action="store_true", help="also look for the longest row that fits")
    add("--limit-s", type=int, default=1800, help="seconds for each run")
    add("--total-s", type=int, help="seconds for all of it: none begins that has no time")
    add("--ranks", type=int, default=2)
    add("--threads", type=int, default=4, help="of each rank")
    add("--tflops", type=positive, help="limit bf16 GEMMs to this rate, such as 71")
    add("--link-gb-s", type=positive, help="pace copies to this rate, each way, such as 12")
    for name in ("--rank", "--gauge"):
        add(name, metavar="JOB", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tflops is not None and arguments.device == "cpu":
        parser.error("--tflops limits a GPU's multiprocessors; leave it out with --device=cpu")
    if not chosen_sides(arguments.shape, arguments.only, arguments.levers):
        names = chosen_sides(arguments.shape, None, with_levers=True)
        parser.error(f"--only: no side is called so; there are {', '.join(s.name for s in names)}")
    return arguments


def positive(text: str) -> float:
    """A rate."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number above 0")
    return value


if __name__ == "__main__":
    main()
