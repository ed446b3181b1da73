"""The monitor of a run: metrics, samples and warnings beside the training loop, one call a step."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from fttrain.config.run_config import to_yaml
from fttrain.distributed.peer_watchdog import uninterruptible
from fttrain.memory.report import PartUsage, part_usage, usage_table
from fttrain.memory.sampling import sample
from fttrain.rig.telemetry import card_watch, gather_samples
from fttrain.strategy.link_monitor import link_monitor
from fttrain.strategy.protocol import StepStats
from fttrain.track import Results, Trackers, open_trackers, read_results
from fttrain.training.auto_plan import link_table
from fttrain.training.session import TrainSession
from fttrain.training.step_metrics import step_metrics
from fttrain.util.atomic_files import write_json
from fttrain.util.warn import warn


class Monitor:
    """The log of a session's steps, the samples of memory, cards and links, and their warnings."""

    def __init__(self, session: TrainSession, trackers: Trackers) -> None:
        """``trackers``: those of rank 0; the other ranks' do nothing."""
        self._session, self._trackers = session, trackers
        self._first_step = session.step + 1
        cache_dir = session.config.frozen.cache_dir
        self._cards = card_watch(session.group.device, cache_dir)
        self._links = link_monitor(session.group, cache_dir)

    def after_step(self, stats: StepStats, lr: float, step_s: float) -> None:
        """Log and sample the step that ``session.step`` counts as done. Every rank calls it.

        ``lr``: its learning rate; ``step_s``: its seconds.
        """
        session, config = self._session, self._session.config
        if session.step == self._first_step:
            report_memory(session)
        if self._is_due(config.loop.log_every):
            metrics = step_metrics(session, stats, lr, step_s)
            self._trackers.log(session.step, metrics)
        if self._is_due(config.track.memory_every):
            self._sample(stats)

    def _is_due(self, every: int) -> bool:
        """Whether this step is one of ``every`` steps, or the last; 0: never."""
        step = self._session.step
        return every > 0 and (step % every == 0 or step == self._session.total_steps)

    def _sample(self, stats: StepStats) -> None:
        session = self._session
        cards = gather_samples(session.group)
        self._trackers.log_memory(session.step, sample_memory(session), cards)
        slow_link = self._links.look(session.group, stats.traffic)
        for line in [*self._cards.look(cards), *([slow_link] if slow_link else [])]:
            warn(f"step {session.step}: {line}")


@contextmanager
def session_trackers(session: TrainSession) -> Iterator[Trackers]:
    """Open rank 0's trackers for the length of the block, and finish them however it ends; those of
    the other ranks do nothing.
    """
    trackers = Trackers()
    if session.group.is_main:
        config, output = session.config, session.output
        shown = yaml.safe_load(to_yaml(config))  # as text: secrets are redacted
        trackers = open_trackers(config.track, output, session.total_steps, session.step, shown)
        trackers.show(session.step, lambda: results_of(session))
    try:
        yield trackers
    except BaseException as error:
        trackers.exit_code = getattr(error, "exit_code", 1)
        raise
    finally:
        with uninterruptible:  # they limit their own time
            trackers.finish()


def results_of(session: TrainSession) -> Results:
    """The results so far, as trackers with pages for them show them; on rank 0."""
    links = link_table(session.config, session.group.world_size)
    return read_results(session.output, session.step, links)


def report_memory(session: TrainSession) -> None:
    """Write each rank's memory in the first step to memory.json, and show that of the fullest rank.
    Every rank calls it.
    """
    ranks = memory_uses(session)
    if session.group.is_main:
        write_json(session.output / "memory.json", {"step": session.step, "ranks": ranks})
        show_fullest(session, ranks, f"step {session.step}")


def memory_uses(session: TrainSession) -> list[list[dict[str, Any]]]:
    """Each rank's parts of memory so far (``PartUsage``), by rank. Every rank calls it."""
    group = session.group
    usages = part_usage(session.strategy.reservations, group.device)
    text = json.dumps([usage.to_json() for usage in usages])
    return [json.loads(group.broadcast_str(text, rank)) for rank in range(group.world_size)]


def show_fullest(session: TrainSession, ranks: list[list[dict[str, Any]]], when: str) -> None:
    """Print the parts of memory of the rank with the fullest card, of ``memory_uses``."""
    fullest = max(range(len(ranks)), key=lambda rank: sum(u["device_bytes"] for u in ranks[rank]))
    shown = [PartUsage.from_json(use) for use in ranks[fullest]]
    for line in usage_table(shown, f"memory of rank {fullest} in {when}"):
        session.say(line)


def sample_memory(session: TrainSession) -> list[dict[str, int]]:
    """Every rank's memory as it is now, by rank: name -> bytes. Every rank calls it."""
    local = sample(session.group.device)
    ranks = session.group.gather([float(size_bytes) for size_bytes in local.values()])
    return [dict(zip(local, map(int, figures), strict=True)) for figures in ranks]
