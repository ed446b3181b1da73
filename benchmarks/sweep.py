"""What a sweep costs beside the runs in it: ``fttrain train -m`` against its trials one by one.

    python benchmarks/sweep.py [--json FILE] [--trials 3] [--steps 10] [--turns 1] [OVERRIDE ...]

Both sides train the demo's model with the same learning rates, each run in processes and a folder
of its own; caches are there before the clock starts. ``by hand`` is ``fttrain train`` once for each
rate, in turn. Of the sweep: how long until its first trial starts (it composes and checks all of
them), and the gaps between one trial's end and the next one's start. Held-out losses of both sides
are compared: they are the same runs.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

GOAL_RATIO, GOAL_START_S = 1.05, 10.0


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    environment, began = common.environment(), time.time()
    rates = [1e-4 * 2**trial for trial in range(arguments.trials)]
    turns: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fttrain-sweep-", dir=arguments.folder) as name:
        common.say(began, "filling the caches")
        _train(arguments, Path(name) / "warm", "optim.lr=1e-4", "loop.max_steps=1")
        for turn in range(arguments.turns):
            common.say(began, f"turn {turn + 1} of {arguments.turns}")
            turns.append(_turn(arguments, Path(name) / str(turn), rates))
    results = _figures(turns)
    common.show(
        f"A sweep of {len(rates)} trials of {arguments.steps} steps, {arguments.turns} turn(s)",
        ("", "median"),
        [[key, f"{value:.3f}"] for key, value in results.items() if isinstance(value, float)],
        environment,
    )
    goals = [
        {
            "goal": f"beyond its start-up a sweep takes under {GOAL_RATIO} of its trials by hand",
            "values": {"ratio": results["ratio"]},
            "met": results["ratio"] < GOAL_RATIO,
        },
        {
            "goal": f"its first trial starts within {GOAL_START_S:.0f} s",
            "values": {"seconds": results["start_s"]},
            "met": results["start_s"] < GOAL_START_S,
        },
    ]
    common.show_goals(goals)
    settings = {key: getattr(arguments, key) for key in ("trials", "steps", "turns", "overrides")}
    common.write_json(
        arguments.json,
        {
            "environment": environment,
            "settings": settings,
            "turns": turns,
            "results": results,
            "goals": goals,
        },
    )
    if not results["same_losses"]:
        sys.exit("held-out losses differ: the two sides did not do the same")


def _turn(arguments: argparse.Namespace, folder: Path, rates: list[float]) -> dict[str, Any]:
    """Both sides once; the sweep second."""
    by_hand = [_train(arguments, folder / f"run{i}", f"optim.lr={r}") for i, r in enumerate(rates)]
    started = time.time()
    swept_s = _train(arguments, folder / "sweep", "-m", f"optim.lr={','.join(map(str, rates))}")
    trials = [json.loads(path.read_text()) for path in folder.glob("sweep/*/trial.json")]
    spans = sorted(trial["spans"][0] for trial in trials)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    return {
        "by_hand_s": by_hand,
        "sweep_s": swept_s,
        "start_s": spans[0][0] - started,
        "gap_s": gaps,
        "end_s": started + swept_s - spans[-1][1],
        "trial_s": [end - start for start, end in spans],
        "same_losses": _losses(folder, "run*") == _losses(folder, "sweep/*"),
    }


def _figures(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns. ``ratio``: of the sweep without its start-up to its trials by hand;
    ``ratio_whole``: of all of it.
    """
    by_hand = [sum(turn["by_hand_s"]) for turn in turns]
    pairs = list(zip(turns, by_hand, strict=True))
    return {
        "by_hand_s": statistics.median(by_hand),
        "sweep_s": statistics.median(turn["sweep_s"] for turn in turns),
        "ratio": statistics.median(
            (turn["sweep_s"] - turn["start_s"]) / own for turn, own in pairs
        ),
        "ratio_whole": statistics.median(turn["sweep_s"] / own for turn, own in pairs),
        "start_s": statistics.median(turn["start_s"] for turn in turns),
        "gap_s": statistics.median([gap for turn in turns for gap in turn["gap_s"]] or [0.0]),
        "end_s": statistics.median(turn["end_s"] for turn in turns),
        "same_losses": all(turn["same_losses"] for turn in turns),
    }


def _train(arguments: argparse.Namespace, output: Path, *more: str) -> float:
    """Seconds of one command, from its start to its end."""
    command = [sys.executable, "-m", "fttrain", "train", "experiment=demo", "launch=cpu_demo"]
    given = [f"loop.max_steps={arguments.steps}", "data.max_rows=400", "loop.samples=0"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *given, *arguments.overrides, *more, f"output={output}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(done.args)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def _losses(folder: Path, runs: str) -> list[float]:
    files = folder.glob(f"{runs}/evaluation.json")
    return sorted(json.loads(file.read_text())["tuned"]["nll"] for file in files)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--trials", type=int, default=3)
    add("--steps", type=int, default=10)
    add("--turns", type=int, default=1)
    add("--folder", metavar="DIR", help="where the runs are kept meanwhile (default: TMPDIR)")
    add("overrides", nargs="*", metavar="OVERRIDE", help="key=value of all runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
