"""The measurement of a rig at the sizes of a model, as the profile that plans are made from."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fttrain.config.run_config import RunConfig, to_yaml
from fttrain.data.config import ROW_MULTIPLE
from fttrain.distributed.process_group import process_group
from fttrain.launcher.launch import require_ranks
from fttrain.model.decoder import Architecture
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.plan.architectures import planned_config
from fttrain.plan.calibrate import calibrate, python
from fttrain.rig.device_setup import set_up_rank
from fttrain.rig.measure import DiskPaths, MeasuredShapes
from fttrain.rig.measure import measure as measure_ranks
from fttrain.rig.profile import RigProfile, profile_path
from fttrain.util.cache_dir import cache_root
from fttrain.util.errors import UserError
from fttrain.util.units import round_up


@dataclass(frozen=True)
class RigMeasurement:
    """A measured profile, with the model and the shapes that it was measured at."""

    profile: RigProfile
    path: Path  # of the profile in the cache folder, where plans look for it
    shapes: MeasuredShapes
    architecture: Architecture
    is_main: bool  # whether this is rank 0, which has written the profile


def measure(config: RunConfig) -> RigProfile:
    """Measure cards, host and links at the sizes of ``config.model``; this machine's profile. Every
    rank calls it.

    It takes minutes, and the machine should do nothing else. Rank 0 writes the profile to
    rig_N.json in the cache folder, N for the number of ranks, and to profile.json in
    ``config.output``. Raises UserError on several nodes.
    """
    return measure_rig(config).profile


def measure_rig(config: RunConfig) -> RigMeasurement:
    """Measure as ``measure`` does."""
    require_ranks(config.launch)
    device = set_up_rank(config.rig)
    architecture = Architecture(planned_config(config.model))
    shapes, disk = _shapes(config, architecture), _disk(config)
    # The ranks agree over gloo: the links that are measured may not work.
    with process_group(torch.device("cpu"), "gloo") as group:
        if group.inter_node.world_size > 1:
            raise UserError("measure: one machine at a time; start it on each without the others")
        link_rank, rig = python("fttrain.training.link_rank"), config.rig
        profile = measure_ranks(shapes, disk, group, device, rig.backend, rig.link_s, link_rank)
        with _settings_file(config) as file:
            trial = python("fttrain.training.trial_rank", str(file))
            profile = calibrate(profile, config.strategy_spec(), architecture, group, trial)
        path = profile_path(group.world_size, config.frozen.cache_dir)
        if group.is_main:
            for target in (path, Path(config.output) / "profile.json"):
                target.parent.mkdir(parents=True, exist_ok=True)
                profile.save(target)
        return RigMeasurement(profile, path, shapes, architecture, group.is_main)


@contextmanager
def _settings_file(config: RunConfig) -> Iterator[Path]:
    """A file with ``config`` for another process, for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="fttrain-measure-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config))
        yield file


def _shapes(config: RunConfig, architecture: Architecture) -> MeasuredShapes:
    """The sizes at which the rig is measured, from the model's configuration alone."""
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


def _disk(config: RunConfig) -> DiskPaths:
    """The layers of any frozen base in the cache, the largest first."""
    root = cache_root(config.frozen.cache_dir)
    files = sorted(
        root.glob("frozen/*/layer_*.bin"), key=lambda file: (-file.stat().st_size, file.name)
    )
    return DiskPaths(files, root)
