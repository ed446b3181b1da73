"""The figures of a step: a line of metrics.jsonl."""

from dataclasses import asdict
from typing import Any

from fttrain.memory.host import peak_host_bytes
from fttrain.memory.sampling import peak_device_bytes
from fttrain.strategy.protocol import StepStats
from fttrain.training.session import TrainSession


def step_metrics(
    session: TrainSession, stats: StepStats, lr: float, step_s: float
) -> dict[str, Any]:
    """The figures of the last step by name; units are in the names. Every rank calls it."""
    loader = session.loader
    return {
        "loss": stats.loss,
        "lr": lr,
        "grad_norm": stats.grad_norm,
        "updated": stats.updated,
        "micro_batch_size": loader.micro_batch_size,
        "epoch": session.step / loader.steps_per_epoch,
        "tokens": stats.tokens,
        "targets": stats.targets,
        "tokens_per_s": stats.tokens / step_s,
        "step_s": step_s,
        "sync_bytes": stats.sync.sync_bytes,
        "sync_s": stats.sync.sync_s,
        "sync_gb_per_s": stats.sync.sync_gb_per_s,
        **_over_ranks(session, stats),
    }


def _over_ranks(session: TrainSession, stats: StepStats) -> dict[str, float]:
    """The figures that differ between ranks: the sum of the bytes that ranks moved; the maximum of
    the seconds that they waited, and of their peaks.
    """
    update = stats.update
    moved = asdict(stats.traffic) | {
        "optim_bytes": update.optim_bytes,
        "optim_gather_bytes": update.optim_gather_bytes,
    }
    wait_s = moved.pop("wait_s")
    maxima = {
        "wait_s": wait_s,
        "sync_wait_s": stats.sync.wait_s,
        "optim_s": update.optim_s,
        "optim_wait_s": update.optim_wait_s,
        "peak_device_bytes": peak_device_bytes(session.group.device),
        "peak_host_bytes": peak_host_bytes(),
    }
    ranks = session.group.gather([float(value) for value in [*moved.values(), *maxima.values()]])
    columns = zip(*ranks, strict=True)  # moved comes first
    folded = {name: sum(next(columns)) for name in moved}
    folded |= {name: max(next(columns)) for name in maxima}
    return {
        name: int(value) if name.endswith("_bytes") else value for name, value in folded.items()
    }
