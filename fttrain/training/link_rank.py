"""``python -m fttrain.training.link_rank JOB``: one rank of a transport, with all that the process
of a run imports. ``measure`` starts it.
"""

import importlib
import sys

from fttrain.rig.link_rank import main


def load_run() -> None:
    """Import what the process of a run imports: the libraries count as memory of a CPU's rank."""
    importlib.import_module("fttrain.training.train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], load_run))
