"""What ``fttrain plan`` says of the runs that ``fit70b.py`` made, beside what they took.

    python benchmarks/fit_plan.py outputs/bench/fit70b.json [--json FILE]
    python benchmarks/fit_plan.py outputs/bench/fit70b.json --rig outputs/measure/profile.json

Of each run, the longer rows included, the peak of the fullest card: predicted from the ledger and
the step on fake tensors, and reserved by torch's allocator. Nothing is run on a card. With --rig
the command itself plans the same shape for that rig first.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from harness.fit_predict import goal, pairs, row
from harness.fit_sides import SHAPES
from harness.fit_steps import architecture_of

COLUMNS = ("run", "T", "predicted GiB", "allocator GiB", "off", "predicted", "it")


def main() -> None:
    """Plan, compare, print, write."""
    arguments = _arguments()
    environment, started_s = common.environment(), time.time()
    fit = json.loads(Path(arguments.fit).read_text())
    settings = fit["settings"]
    shape = SHAPES[settings["shape"]]
    if arguments.rig:
        plan_command(arguments.rig, shape, settings["seq_len"])
    found = []
    for pair in pairs(fit["results"], settings, shape):
        common.say(started_s, f"{pair['side']}, T={pair['seq_len']}")
        found.append(pair)
    title = (
        f"{settings['shape']}: peak of the fullest of {settings['ranks']} cards, capped at "
        f"{settings['cap_gib']} GiB, without what lies outside torch's allocator"
    )
    common.show(title, COLUMNS, map(row, found), environment)
    goals = [goal(found)]
    common.show_goals(goals)
    figures = {"environment": environment, "settings": settings, "results": found, "goals": goals}
    common.write_json(arguments.json, figures)


def plan_command(rig: str, shape: dict[str, Any], seq_len: int) -> int:
    """``fttrain plan`` as a user types it, of a model's ``config.json`` alone; its exit code: where
    nothing fits, not 0.
    """
    from fttrain.cli import main as fttrain

    with tempfile.TemporaryDirectory(prefix="fttrain-plan-") as folder:
        architecture_of(shape).config.save_pretrained(folder)
        settings = ["experiment=llama3_70b_2x24gb", f"model.path={folder}", f"rig.profile={rig}"]
        return fttrain(["plan", *settings, f"data.seq_len={seq_len}", f"output={folder}/plan"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fit", metavar="FIT", help="the JSON that fit70b.py wrote")
    parser.add_argument("--rig", metavar="PROFILE", help="as rig.profile: also run `fttrain plan`")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
