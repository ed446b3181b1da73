"""Trackers of a run: metrics.jsonl, memory.jsonl, a progress bar, W&B, TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fttrain.track.base import Results, Table, TrackConfig, Tracker, Trackers
from fttrain.track.metrics import MetricsFile, read_metrics
from fttrain.track.progress import counting, progress
from fttrain.track.results import read_results
from fttrain.track.tensorboard import open_tensorboard
from fttrain.track.wandb import open_wandb
from fttrain.util.warn import Warn, warn

__all__ = [
    "MetricsFile",
    "Results",
    "Table",
    "TrackConfig",
    "Tracker",
    "Trackers",
    "counting",
    "open_trackers",
    "progress",
    "read_metrics",
    "read_results",
]


def open_trackers(
    config: TrackConfig,
    folder: Path | str,
    total_steps: int,
    resumed_step: int = 0,
    run_config: Mapping[str, Any] | None = None,
    warn: Warn = warn,
) -> Trackers:
    """Open all trackers of a run, for rank 0. Other ranks use ``Trackers()``, which does nothing.

    Args:
        config: the trackers beside metrics.jsonl.
        folder: the run's folder, which exists.
        total_steps: optimizer steps of the whole run.
        resumed_step: steps done before; lines past it are dropped, for these steps run again.
        run_config: the run's settings for the trackers to show, without secrets.
        warn: called with each warning.
    """
    trackers: list[Tracker] = [MetricsFile(Path(folder) / "metrics.jsonl", resumed_step, warn)]
    trackers.append(progress(total_steps, resumed_step))
    charts: list[Tracker] = []
    if "wandb" in config.kinds:
        charts.append(open_wandb(config, folder, run_config or {}, warn))
    if "tensorboard" in config.kinds:
        charts.append(open_tensorboard(folder, resumed_step, run_config or {}, warn))
    memory = Path(folder) / "memory.jsonl"
    # The file of an earlier start is cut to the resumed step even where it gets no more lines.
    is_sampled = config.memory_every > 0 or memory.exists()
    samples = MetricsFile(memory, resumed_step, warn) if is_sampled else None
    return Trackers([*trackers, *charts], samples, charts)
