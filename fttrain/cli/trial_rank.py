"""``python -m fttrain.cli.trial_rank [key=value ...] FILE``: a rank's trial (``plan/trial.py``) of
the configuration's model, written to FILE; ``fttrain measure`` starts it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fttrain.config.run_config import compose
from fttrain.launcher.launch import die_with_parent
from fttrain.plan.architectures import planned_config
from fttrain.plan.trial import run_trial
from fttrain.rig.device_setup import set_up_rank
from fttrain.training.session import strategy_spec
from fttrain.util.errors import UserError


def main(overrides: Sequence[str], result: str) -> int:
    """Run the trial; return the exit code of the process."""
    die_with_parent()
    try:
        config = compose(overrides)
        device = set_up_rank(config.rig)
        trial = run_trial(strategy_spec(config), planned_config(config.model), device)
    except UserError as error:
        print(f"fttrain: error: {error}", file=sys.stderr)
        return error.exit_code
    Path(result).write_text(json.dumps(asdict(trial)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:-1], sys.argv[-1]))
