"""``fttrain quantize``: build the frozen base of a model in the cache, or verify it there."""

import time

from fttrain.config.run_config import RunConfig
from fttrain.launcher import launch


def run(config: RunConfig, argv: list[str]) -> int:
    """Quantise ``config.model`` into the frozen cache, on this rank or on the ranks of ``launch=``.

    An existing cache is verified file by file against its SHA-256; missing and damaged files are
    built anew.
    """
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    # Late: these load torch and transformers, which a launcher does not need.
    from fttrain.distributed.process_group import process_group
    from fttrain.frozen.build import open_or_build
    from fttrain.frozen.source import resolve
    from fttrain.rig.device_setup import set_up_rank
    from fttrain.strategy.builder import frozen_base, silent
    from fttrain.track import counting
    from fttrain.util.units import duration, gib

    device = set_up_rank(config.rig)
    base = frozen_base(resolve(config.model), config.quant, config.model.dtype)
    started = time.monotonic()
    with process_group(device, config.rig.backend) as group:
        show = counting if group.intra_node.is_main else silent
        built = 0  # files

        def progress(done: int, total: int) -> None:
            nonlocal built
            built = total
            shown(done, total)

        shown = show(f"quantising {config.model.name}")
        cache = open_or_build(base, config.frozen.cache_dir, group, progress, verify=True)
        if group.intra_node.is_main:
            print(
                f"{cache.folder}: {len(cache)} layers, {gib(cache.size_bytes)}, verified; "
                f"{built} file(s) made in {duration(time.monotonic() - started)}"
            )
    return 0
