"""``fttrain train -m``: many trials of one run, each a launch of its own, searched by Hydra."""
