"""``python -m fttrain.training.trial_rank CONFIG FILE``: a rank's trial (``plan/trial.py``) of the
model that the settings in CONFIG (config.yaml of a run) describe, written to FILE as JSON.
``measure`` starts it, in a fresh process for each rank.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from fttrain.config.run_config import checked
from fttrain.launcher.launch import die_with_parent
from fttrain.plan.architectures import planned_config
from fttrain.plan.trial import run_trial
from fttrain.rig.device_setup import set_up_rank
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.util.errors import UserError


def main(settings: str, answer: str) -> int:
    """Take the trial; the exit code of the process. ``settings``, ``answer``: paths."""
    die_with_parent()
    try:
        config = checked(yaml.safe_load(Path(settings).read_text()))
        device = set_up_rank(config.rig, config.strategy.name == DEEPSPEED)
        trial = run_trial(config.strategy_spec(), planned_config(config.model), device)
    except UserError as error:
        print(f"fttrain: error: {error}", file=sys.stderr)
        return error.exit_code
    Path(answer).write_text(json.dumps(asdict(trial)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
