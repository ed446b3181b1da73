"""Balance of a pipeline: the contiguous layers of each stage."""

import math
from collections.abc import Sequence

from fttrain.util.errors import UserError
from fttrain.util.units import gib

ROOMY = 0.75  # share of a device's free memory up to which no stage counts as fuller than another


def balance(
    layers: int,
    layer_bytes: Sequence[int],
    fixed_bytes: Sequence[int],
    free_bytes: Sequence[int],
) -> list[range]:
    """The contiguous layers of each stage. They are divided evenly while no stage is fuller than
    ``ROOMY``, because a pipeline is as fast as its longest stage; otherwise so that the fullest
    stage is as little full as possible.

    Bytes on each stage: ``layer_bytes`` of one more layer, with its saved activations of the
    micro-batches in flight; ``fixed_bytes`` of all else (embedding, head, dequantised weights);
    ``free_bytes`` of its device. Raises UserError for more stages than layers, and for a stage that
    cannot hold its part.
    """
    stages = len(free_bytes)
    if stages > layers:
        raise UserError(
            f"strategy=pipeline on {stages} ranks: the model has {layers} layers, and each stage "
            f"needs one; fewer ranks help"
        )

    def fill(stage: int, count: int) -> float:
        needed, free = fixed_bytes[stage] + count * layer_bytes[stage], free_bytes[stage]
        # Free bytes are negative where the allocator holds more than its limit.
        return needed / free if free > 0 else math.inf

    def burden(stage: int) -> tuple[float, int, float]:
        """The sort key of a stage for one more layer: fill above ``ROOMY``, layers, fill."""
        next_fill = fill(stage, counts[stage] + 1)
        return max(next_fill, ROOMY), counts[stage], next_fill

    counts = [1] * stages
    for _ in range(layers - stages):
        counts[min(range(stages), key=burden)] += 1
    for stage, count in enumerate(counts):
        if fill(stage, count) > 1:
            needed = fixed_bytes[stage] + count * layer_bytes[stage]
            raise UserError(
                f"strategy=pipeline: stage {stage} would need {gib(needed)} for {count} of "
                f"{layers} layers, {gib(max(0, free_bytes[stage]))} are free there; "
                "embedding=host, lm_head=quantized, layer_inputs=host, optim.offload=true or "
                "strategy=stream "
                "help"
            )
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
