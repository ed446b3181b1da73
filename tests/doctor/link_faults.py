"""A rank that hangs, dies or whose sum is wrong in one value, in the place of the real probe; FAULT
in the environment says which.
"""

import os
import sys
import time


def flip() -> None:
    from torch import Tensor

    from fttrain.distributed import collectives
    from fttrain.doctor import link_probe

    right = collectives.all_reduce

    def flips(flat: Tensor) -> collectives.Handle:
        right(flat).wait()
        flat[77] += 1
        return collectives.HandleGroup(())

    collectives.all_reduce = flips
    link_probe.main(sys.argv[1:])


if __name__ == "__main__":
    fault = os.environ["FAULT"]
    if fault == "flips":
        flip()
    elif fault == "hangs":
        time.sleep(600)
    elif os.environ["RANK"] == "1":
        sys.exit("libgloo: no interface")
    else:
        time.sleep(600)  # it waits for the other, as in a collective
