"""A trial of a sweep: a run in its own folder, started, attended and judged."""

import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fttrain.config.run_config import RunConfig, checked, compose_values, plain, quoted
from fttrain.sweep import stop
from fttrain.sweep.child import Child
from fttrain.sweep.config import Sweep
from fttrain.sweep.objective import OBJECTIVES
from fttrain.sweep.prune import curve, hopeless, share_done
from fttrain.sweep.record import FINISHED, Record, records, trial_name
from fttrain.util.errors import UserError

LOG = "train.log"
WORST = math.inf  # returned to the search for a trial without a value
POLL_S = 0.1
LOOK_S = 2.0  # between checks of the metrics and of the sweep's process
NOT_SEARCHED = ("output", "track", "resume", "dry_run")  # may differ between attempts

composing = threading.Lock()  # Hydra's state is global to the process


@dataclass(frozen=True)
class TrialPlace:
    """The part of the machine that a trial has to itself."""

    overrides: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment
    cores: tuple[int, ...] = ()  # CPU cores; none: all


EVERYWHERE = TrialPlace()


def run_trial(
    sweep: Sweep, overrides: Sequence[str], trial_place: TrialPlace = EVERYWHERE
) -> float:
    """Run the trial, or resume it, unless it is finished; return its value for the search.

    Does not raise for a failed trial: its record has the reason, and the search goes on.
    """
    if stop.asked(sweep.folder):
        return WORST
    folder = sweep.folder / trial_name(overrides)
    record = Record.read(folder) or Record(folder.name, list(overrides))
    if record.state == "done":  # the objective may have changed since
        record.value = OBJECTIVES[sweep.config.objective].measure(folder)
    elif record.state not in FINISHED:
        folder.mkdir(parents=True, exist_ok=True)
        _Attempt(sweep, record, trial_place).run()
    return WORST if record.value is None else record.value


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that identify a trial: all but those of its output, secrets redacted."""
    return {key: value for key, value in plain(config).items() if key not in NOT_SEARCHED}


def trial_arguments(
    sweep: Sweep, overrides: Sequence[str], trial_place: TrialPlace = EVERYWHERE
) -> list[str]:
    """The arguments of ``fttrain train`` for a trial, but for those of trackers."""
    output = quoted(str(sweep.folder / trial_name(overrides)))
    return [*sweep.fixed, *overrides, *trial_place.overrides, f"output={output}"]


class _Attempt:
    """An attempt of a trial: one start of its run, until its end."""

    def __init__(self, sweep: Sweep, record: Record, trial_place: TrialPlace) -> None:
        self._sweep, self._record, self._trial_place = sweep, record, trial_place
        self._folder = sweep.folder / record.name
        self._stopped = self._pruned = False  # the reason for its SIGTERM, if any

    def run(self) -> None:
        """Start the run, wait for its end, and record the outcome."""
        record = self._record
        record.state, record.reason, record.exit_code = "running", "", None
        record.spans.append([time.time()])
        try:
            arguments = self._arguments()
            record.write(self._folder)
            child = Child(
                ["train", *arguments],
                self._folder / LOG,
                self._sweep.cwd,
                self._trial_place.variables,
                self._trial_place.cores,
            )
            try:
                record.exit_code = self._attend(child)
            finally:
                child.kill()
            self._judge(child, record.exit_code)
        except UserError as error:
            record.state, record.reason, record.exit_code = "failed", str(error), error.exit_code
        record.spans[-1].append(time.time())
        record.write(self._folder)

    def _arguments(self) -> list[str]:
        """The arguments of the run. Raises UserError where they do not compose."""
        arguments = trial_arguments(self._sweep, self._record.overrides, self._trial_place)
        with composing:
            values, self._record.choices = compose_values(arguments)
        config = checked(values)
        self._record.settings = identity(config)
        self._evaluated = config.loop.eval_every > 0
        if config.track.kind == "none":
            return arguments
        names = {"group": self._sweep.folder.name, "name": self._record.name}
        return arguments + [f"track.{key}={quoted(name)}" for key, name in names.items()]

    def _attend(self, child: Child) -> int:
        """Forward signals, and stop a hopeless run; return the exit code."""
        sent, looked = 0, time.monotonic()
        while (code := child.poll()) is None:
            signums = stop.asked(self._sweep.folder)
            for signum in signums[sent:]:
                child.send(signum)
                self._stopped = True
            sent = max(sent, len(signums))
            if time.monotonic() - looked >= LOOK_S:
                self._look(child)
                looked = time.monotonic()
            time.sleep(POLL_S)
        return code

    def _look(self, child: Child) -> None:
        """Check the progress, the sweep's process and the median rule."""
        if child.total_steps != self._record.total_steps and child.total_steps:
            self._record.total_steps = child.total_steps
            self._record.write(self._folder)
        if self._stopped or self._pruned:
            return
        self._stopped = stop.abandoned(self._sweep.folder, self._sweep.host)
        self._pruned = not self._stopped and self._is_hopeless()
        if self._stopped or self._pruned:
            child.send(signal.SIGTERM)

    def _is_hopeless(self) -> bool:
        settings, total = self._sweep.config, self._record.total_steps
        if settings.prune == "none" or not total:
            return False
        finished = [
            share_done(curve(self._sweep.folder / other.name, self._evaluated), other.total_steps)
            for other in records(self._sweep.folder)
            if other.state == "done" and other.total_steps
        ]
        points = share_done(curve(self._folder, self._evaluated), total)
        return hopeless(points, finished, settings.prune_after, settings.prune_warmup)

    def _judge(self, child: Child, code: int) -> None:
        """Record the outcome of the run that ended with ``code``."""
        record, objective = self._record, OBJECTIVES[self._sweep.config.objective]
        record.total_steps = child.total_steps or record.total_steps
        record.value = objective.measure(self._folder) if code == 0 else None
        if code == 0:
            record.state = "failed" if record.value is None else "done"
            record.reason = f"{objective.label}: no number" if record.value is None else ""
        elif self._stopped:
            record.state = "interrupted"
        elif self._pruned and code == 128 + signal.SIGTERM:
            step, record.value = curve(self._folder, self._evaluated)[-1]
            record.state, record.reason = "pruned", f"after step {step}"
        else:
            record.state, record.reason = "failed", child.reason(code)
