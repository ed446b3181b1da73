"""``fttrain doctor``: is this machine fit for a run, and what mends it where it is not."""
