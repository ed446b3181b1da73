"""Which contiguous layers each stage of a pipeline gets."""

import math
from collections.abc import Sequence

from fttrain.util.errors import UserError
from fttrain.util.units import gib

ROOMY = 0.75  # of a device's free memory: up to here no stage counts as fuller than another


def balance(
    layers: int,
    layer_bytes: Sequence[int],
    fixed_bytes: Sequence[int],
    free_bytes: Sequence[int],
) -> list[range]:
    """Contiguous layers of each stage: as evenly as can be where all have ``ROOMY`` memory, for a
    pipeline is as fast as its longest stage; else so that the fullest one is as little full as can
    be.

    ``layer_bytes``: what one more layer takes on each stage, with what it keeps for the
    micro-batches under way; ``fixed_bytes``: what it takes anyway (embedding, head,
    dequantised weights); ``free_bytes``: what its device has. Raises UserError for more stages than
    layers, and for a stage that cannot hold its part.
    """
    stages = len(free_bytes)
    if stages > layers:
        raise UserError(
            f"strategy=pipeline on {stages} ranks: the model has {layers} layers, and each stage "
            f"needs one; fewer ranks help"
        )

    def fill(stage: int, count: int) -> float:
        needed, free = fixed_bytes[stage] + count * layer_bytes[stage], free_bytes[stage]
        # An allocator that holds more than it may leaves less than nothing.
        return needed / free if free > 0 else math.inf

    def burden(stage: int) -> tuple[float, int, float]:
        """Of one more layer."""
        more = fill(stage, counts[stage] + 1)
        return max(more, ROOMY), counts[stage], more

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
