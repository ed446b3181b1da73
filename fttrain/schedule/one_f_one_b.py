"""1F1B: each stage of a pipeline alternates one forward and one backward (PipeDream-Flush,
Narayanan et al. 2021, "Memory-efficient pipeline-parallel DNN training").

    stage 0   F0 F1 B0 F2 B1 F3 B2 .. B3
    stage 1      F0 B0 F1 B1 F2 B2 F3 B3

A stage never has more than ``stages - stage`` micro-batches between their forward and backward.
"""

from collections.abc import Callable


def one_f_one_b(
    stage: int,
    stages: int,
    micro_batches: int,
    forward: Callable[[int], None],
    backward: Callable[[int], None],
) -> None:
    """Call ``forward`` and ``backward`` once for each of ``micro_batches``, in 1F1B's order.

    Each of the two runs in the order of the micro-batches, on every stage.
    """
    ahead = min(in_flight(stage, stages) - 1, micro_batches)
    for number in range(ahead):
        forward(number)
    for number in range(ahead, micro_batches):
        forward(number)
        backward(number - ahead)
    for number in range(micro_batches - ahead, micro_batches):
        backward(number)


def in_flight(stage: int, stages: int) -> int:
    """The most micro-batches that a stage has between forward and backward."""
    return stages - stage
