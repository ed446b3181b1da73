"""``fttrain measure``: the rates of this machine, as a profile for plans."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from fttrain.config.run_config import RunConfig
from fttrain.launcher import launch

if TYPE_CHECKING:
    from fttrain.model.decoder import Architecture
    from fttrain.rig.measure import DiskPaths, MeasuredShapes


def run(config: RunConfig, argv: list[str]) -> int:
    """Measure cards, host and links at the sizes of ``config.model``; the exit code is 1 where a
    link is wrong.

    The profile goes to rig_N.json in the cache folder, N for the number of ranks, and beside
    measure.md into ``config.output``.
    """
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    # Late: these load torch and transformers, and a launcher does without.
    import torch
    from rich.console import Console

    from fttrain.distributed.process_group import process_group
    from fttrain.model.decoder import Architecture
    from fttrain.plan.architectures import planned_config
    from fttrain.plan.calibrate import calibrate, python
    from fttrain.plan.links import step_table
    from fttrain.rig.device_setup import set_up_rank
    from fttrain.rig.measure import measure
    from fttrain.rig.measure_report import closing_line, tables, write_report
    from fttrain.rig.profile import profile_path
    from fttrain.training.session import strategy_spec
    from fttrain.util.errors import UserError

    started = time.monotonic()
    device = set_up_rank(config.rig)
    architecture = Architecture(planned_config(config.model))
    work, disk = _work(config, architecture), _disk(config)
    # The ranks agree over gloo: the links that are measured may not work.
    with process_group(torch.device("cpu"), "gloo") as group:
        if group.inter_node.world_size > 1:
            raise UserError("measure: one machine at a time; start it on each without the others")
        link_rank = python("fttrain.cli.link_rank")
        rig = config.rig
        profile = measure(work, disk, group, device, rig.backend, rig.link_s, link_rank)
        trial = python("fttrain.cli.trial_rank", *argv[1:])
        profile = calibrate(profile, strategy_spec(config), architecture, group, trial)
        if group.is_main:
            path = profile_path(group.world_size, config.frozen.cache_dir)
            output = Path(config.output)
            for folder in (path.parent, output):
                folder.mkdir(parents=True, exist_ok=True)
            profile.save(path)
            profile.save(output / "profile.json")
            console = Console()
            over_links = step_table(strategy_spec(config), architecture, profile)
            printed = [*tables(profile, work), *([over_links] if over_links else [])]
            for table in printed:
                table.show(console)
            print(f"{closing_line(profile, time.monotonic() - started)}\nprofile: {path}")
            print(f"report: {write_report(output, profile, work, printed)}")
    return int(any(link.wrong for link in profile.links))


def _work(config: RunConfig, architecture: "Architecture") -> "MeasuredShapes":
    """The sizes of the model's work, from its configuration alone."""
    import torch

    from fttrain.data.batch import ROW_MULTIPLE
    from fttrain.model.layer_adapters import LayerAdapters
    from fttrain.rig.measure import MeasuredShapes
    from fttrain.util.units import round_up

    dtype = getattr(torch, config.model.dtype)
    adapters = LayerAdapters(0, architecture.groups, config.lora, torch.device("meta"), dtype)
    tokens = round_up(config.loop.micro_batch_size * config.data.seq_len, ROW_MULTIPLE)
    return MeasuredShapes(
        name=config.model.name,
        layers=architecture.layers,
        tokens=tokens,
        micro_batches=config.loop.gradient_accumulation_steps,
        frozen_format=architecture.frozen_format(config.quant, dtype),
        gradient_bytes=adapters.layout.values * 4,  # fp32
        boundary_bytes=tokens * architecture.hidden * dtype.itemsize,
    )


def _disk(config: RunConfig) -> "DiskPaths":
    """The layers of any frozen base in the cache, the largest first."""
    from fttrain.rig.measure import DiskPaths
    from fttrain.util.cache_dir import cache_root

    root = cache_root(config.frozen.cache_dir)
    files = sorted(
        root.glob("frozen/*/layer_*.bin"), key=lambda file: (-file.stat().st_size, file.name)
    )
    return DiskPaths(files, root)
