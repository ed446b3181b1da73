"""``fttrain doctor``: checks whether this machine is fit for a run, each with a remedy."""
