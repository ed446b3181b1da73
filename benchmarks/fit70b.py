"""Llama-3-70B on two cards of 24 GB: does it fit, how fast is it, how long may a row be?

    python benchmarks/fit70b.py [--json FILE] [--longest] [--only shard pipeline]
    python benchmarks/fit70b.py --shape tiny --device cpu     # a smoke run

The model's exact shape with random NF4 bytes, made directly in the stores: nothing is downloaded.
Two ranks, each with torch's allocator capped such that it and the context stay within --cap-gib,
train r=16 on all linears for some real optimizer steps, each strategy at several accumulations,
each in processes of its own. ``out of memory`` and ``refused`` are answers, not errors; a run that
fails or goes beyond its time limit is named and makes the exit code 1, after all others have run.
The JSON is written after each run.

Two ranks may share one GPU. NCCL then takes them only as if on two hosts and over sockets: seconds
waited and tokens/s mean nothing for a rig (the table says so), memory does.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from harness.fit_rank import OUT_OF_MEMORY, REFUSED, reason, run_rank
from harness.fit_report import CARD_GIB, goals, show

from fttrain.launch import read_env
from fttrain.paths import launch_folder
from fttrain.units import duration

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SHAPES = {  # as config.json has them
    "llama3_70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        **ROPE,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **ROPE,
    },
}
LAYERS_ON_CARD = {"llama3_70b": 30, "tiny": 2}  # of stream, chosen to fit beside the rest
LONGER = (1.5, 2, 3, 4, 6, 8, 12, 16)  # times --seq-len, in search of the longest row
LAUNCH_FILE = "2x3090_pcie.env"  # a rig's settings, as they ship
ALLOCATOR = "PYTORCH_ALLOC_CONF"
OUTCOMES: dict[object, str] = {  # by exit code
    OUT_OF_MEMORY: "out of memory",
    REFUSED: "refused",
    128 + signal.SIGALRM: "time limit",
}
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # by the user: nothing is to follow

Result = dict[str, Any]


def sides(shape: str) -> dict[str, dict[str, Any]]:
    """Settings of each side; k: layers of ``stream`` that stay on the card."""
    some = LAYERS_ON_CARD[shape]
    return {
        "shard": {"name": "shard"},
        f"stream k={some}": {"name": "stream", "resident_layers": some},
        "stream k=0": {"name": "stream", "resident_layers": 0},
        "pipeline": {"name": "pipeline"},
    }


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    if arguments.rank:
        run_rank(arguments.rank)
        return
    if arguments.device == "cuda":  # what the user has set wins
        os.environ.setdefault(ALLOCATOR, read_env(launch_folder() / LAUNCH_FILE)[ALLOCATOR])
    environment = common.environment()
    settings = vars(arguments) | {"allocator": os.environ.get(ALLOCATOR)}
    results: list[Result] = []
    figures: dict[str, Any] = {
        "environment": environment,
        "settings": settings,
        "results": results,
        "goals": [],
    }
    for _ in measure(arguments, results):
        figures["goals"] = goals(results, settings, list(sides(arguments.shape)))
        common.write_json(arguments.json, figures)
    show(results, settings, environment)
    common.show_goals(figures["goals"])
    runs = [run for result in results for run in (result, *result.get("tries", []))]
    sys.exit(int(any(run["outcome"] in ("failed", "time limit") for run in runs)))


def measure(arguments: argparse.Namespace, results: list[Result]) -> Iterator[None]:
    """Adds to ``results``; comes back after each run."""
    started_s = time.time()
    names = ("device", "cap_gib", "steps", "ranks", "threads", "limit_s")
    usual = {name: getattr(arguments, name) for name in names} | {"started_s": started_s}
    usual["shape"] = SHAPES[arguments.shape]
    for accumulation in arguments.accumulation:
        for name, strategy in sides(arguments.shape).items():
            if not any(word in name for word in arguments.only or [""]):
                continue
            side = f"{name}, accumulation {accumulation}"
            job = {**usual, "strategy": strategy, "accumulation": accumulation, "side": side}
            found = run(job | {"seq_len": arguments.seq_len})
            result = {"side": side, "name": name, "strategy": strategy, **found}
            results.append(result)
            yield
            first = accumulation == arguments.accumulation[0]
            if arguments.longest and first and found["outcome"] == "fits":
                yield from longer_rows(result, job | {"steps": 1})


def longer_rows(result: Result, job: dict[str, Any]) -> Iterator[None]:
    """Adds what was tried to a ``result``; comes back after each run."""
    result["tries"] = []
    lengths = [int(times * result["seq_len"]) for times in LONGER]
    for attempt in search(lengths, lambda seq_len: run(job | {"seq_len": seq_len})):
        result["tries"].append(attempt)
        yield


def search(lengths: list[int], run: Callable[[int], Result]) -> Iterator[Result]:
    """Runs with those of ``lengths``, which ascend, that narrow down the longest that fits: 4 of 8.

    What does not end in time counts as if it did not fit.
    """
    fitting, too_long = 0, len(lengths)  # lengths[:fitting] fit, lengths[too_long:] do not
    while fitting < too_long:
        middle = (fitting + too_long) // 2
        result = run(lengths[middle])
        if result["outcome"] == "fits":
            fitting = middle + 1
        else:
            too_long = middle
        yield result


def run(job: dict[str, Any]) -> Result:
    """What came of a job, in processes of its own, and what its ranks reported."""
    what = f"{job['side']}, T={job['seq_len']}"
    limit = duration(job["limit_s"])
    common.say(job["started_s"], f"{what}: {job['steps']} steps, {limit} at most")
    began, outcome, ranks = time.time(), "fits", []
    with tempfile.TemporaryDirectory(prefix="fttrain-fit-") as folder:
        try:
            ranks = common.run_ranks(str(Path(__file__).resolve()), job, Path(folder))
        except SystemExit as failure:
            if failure.code in STOPPED:
                raise
            outcome = OUTCOMES.get(failure.code, "failed")
        why = reason(Path(folder))
    wall_s = time.time() - began
    ended = f"{outcome}: {why}" if why else outcome
    common.say(job["started_s"], f"{what}: after {duration(wall_s)}: {ended}")
    return {
        "seq_len": job["seq_len"],
        "outcome": outcome,
        "reason": why,
        "wall_s": wall_s,
        "ranks": ranks,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--shape", choices=SHAPES, default="llama3_70b")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--cap-gib", type=float, default=CARD_GIB, help="of each rank, context included")
    add("--seq-len", type=int, default=2048)
    add("--steps", type=int, default=5)
    add("--accumulation", type=int, nargs="+", default=[1, 8])
    add("--only", nargs="+", metavar="TEXT", help="sides with one of these in their name")
    add("--longest", action="store_true", help="also look for the longest row that fits")
    add("--limit-s", type=int, default=1800, help="seconds for each run")
    add("--ranks", type=int, default=2)
    add("--threads", type=int, default=4, help="of each rank")
    add("--rank", metavar="JOB", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
