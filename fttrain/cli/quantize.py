"""``fttrain quantize``: make the frozen base of a model, or verify the one that is there."""

import os
import time

from fttrain import launch
from fttrain.config import RunConfig


def run(config: RunConfig, argv: list[str]) -> int:
    """Quantise ``config.model`` into the frozen cache, on this rank or on those that ``launch=``
    asks for. A cache that exists is compared with its SHA-256 file by file; what is missing or
    damaged is made again.
    """
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    # Late: these load torch and transformers, and a launcher does without.
    from fttrain.checkpoint.frozen_build import open_or_build
    from fttrain.checkpoint.source import resolve
    from fttrain.dist import process_group, rank_from_environment
    from fttrain.rig.probe import set_up
    from fttrain.strategy.build import frozen_base, silent
    from fttrain.track import counting
    from fttrain.units import duration, gib

    _, world_size, local_rank = rank_from_environment()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    device = set_up(config.rig, local_rank, local_world_size)
    base = frozen_base(resolve(config.model), config.quant, config.model.dtype)
    started = time.monotonic()
    with process_group(device) as group:
        show = counting if group.is_main else silent
        made = 0

        def progress(done: int, total: int) -> None:
            nonlocal made
            made = total
            shown(done, total)

        shown = show(f"quantising {config.model.name}")
        cache = open_or_build(base, config.frozen, group, progress, verify=True)
        if group.is_main:
            print(
                f"{cache.folder}: {len(cache)} layers, {gib(cache.size_bytes)}, verified; "
                f"{made} file(s) made in {duration(time.monotonic() - started)}"
            )
    return 0
