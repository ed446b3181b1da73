"""``fttrain train -m``: a sweep. Hydra chooses trials; each is a separate launch of one run."""
