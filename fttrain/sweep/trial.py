"""One trial of a sweep: a run in a folder of its own, started, attended and judged."""

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
WORST = math.inf  # what the search is told of a trial without a value
POLL_S = 0.1
LOOK_S = 2.0  # between looks at the metrics, and at whether the sweep still lives
NOT_SEARCHED = ("output", "track", "resume", "dry_run")  # may differ between attempts

composing = threading.Lock()  # Hydra's state is the process's


@dataclass(frozen=True)
class TrialPlace:
    """Where a trial runs that has a part of the machine to itself."""

    overrides: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment
    cores: tuple[int, ...] = ()  # of the CPU; none: all


EVERYWHERE = TrialPlace()


def run_trial(sweep: Sweep, overrides: Sequence[str], place: TrialPlace = EVERYWHERE) -> float:
    """Runs the trial unless it is finished, or goes on with it; what the search is told.

    Never raises for what is wrong with a trial: its record says so, and the search goes on.
    """
    if stop.asked(sweep.folder):
        return WORST
    folder = sweep.folder / trial_name(overrides)
    record = Record.read(folder) or Record(folder.name, list(overrides))
    if record.state == "done":  # what is minimised may be something else by now
        record.value = OBJECTIVES[sweep.config.objective].measure(folder)
    elif record.state not in FINISHED:
        folder.mkdir(parents=True, exist_ok=True)
        _Attempt(sweep, record, place).run()
    return WORST if record.value is None else record.value


def identity(config: RunConfig) -> dict[str, Any]:
    """What must be the same for a trial to count as the same one: its settings, secrets redacted,
    without those that only say where it is kept.
    """
    return {key: value for key, value in plain(config).items() if key not in NOT_SEARCHED}


def told(sweep: Sweep, overrides: Sequence[str], place: TrialPlace = EVERYWHERE) -> list[str]:
    """What ``fttrain train`` is told of a trial, but for trackers."""
    output = quoted(str(sweep.folder / trial_name(overrides)))
    return [*sweep.fixed, *overrides, *place.overrides, f"output={output}"]


class _Attempt:
    """One start of a trial's run, until its end."""

    def __init__(self, sweep: Sweep, record: Record, place: TrialPlace) -> None:
        self._sweep, self._record, self._place = sweep, record, place
        self._folder = sweep.folder / record.name
        self._stopped = self._pruned = False  # why it was asked to end, if it was

    def run(self) -> None:
        """Starts it, waits for its end, and writes down what became of it."""
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
                self._place.variables,
                self._place.cores,
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
        """What the run is told; raises UserError where it does not compose."""
        arguments = told(self._sweep, self._record.overrides, self._place)
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
        """Passes signals on, and stops a run that is hopeless; its exit code."""
        sent, looked = 0, time.monotonic()
        while (code := child.poll()) is None:
            wishes = stop.asked(self._sweep.folder)
            for signum in wishes[sent:]:
                child.send(signum)
                self._stopped = True
            sent = max(sent, len(wishes))
            if time.monotonic() - looked >= LOOK_S:
                self._look(child)
                looked = time.monotonic()
            time.sleep(POLL_S)
        return code

    def _look(self, child: Child) -> None:
        """What need not be known at once."""
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
        own = share_done(curve(self._folder, self._evaluated), total)
        return hopeless(own, finished, settings.prune_after, settings.prune_warmup)

    def _judge(self, child: Child, code: int) -> None:
        """What became of the run that ended with ``code``."""
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
