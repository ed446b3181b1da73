"""``fttrain train -m``: a sweep, one run for each combination of values or sweeper's choice."""

import os
from collections.abc import Sequence
from pathlib import Path

from fttrain.checkpoint.output_lock import lock_output
from fttrain.config.run_config import RunConfig
from fttrain.sweep import axes, cards, check, multirun, stop
from fttrain.sweep.config import Sweep, SweepConfig
from fttrain.sweep.record import records
from fttrain.sweep.trial import TrialPlace
from fttrain.sweep.watch import Watch
from fttrain.util import schema
from fttrain.util.errors import UserError


def sweep(arguments: Sequence[str]) -> int:
    """Run the sweep that ``arguments`` describe; return the exit code of the process.

    Exit code 0 where at least one trial is finished and none failed, 1 otherwise, 130 or 143 after
    a signal. Raises UserError, before the first trial, for invalid arguments.
    """
    request = axes.read(arguments)
    config = multirun.search_config(request.search, request.hydra)
    values = multirun.settings_of(config)
    settings = schema.build(SweepConfig, values["sweep"], "sweep")
    axes.add_searched(request, values["params"])
    check.check_axes(request.axes, multirun.takes_intervals(config))
    samples = check.samples(request.axes)
    configs = check.check_trials(request.fixed, samples, settings)
    places = _places(settings, request, configs[0])
    planned = Sweep(
        _folder(request.output, configs[0]),
        tuple(request.fixed),
        settings,
        Path.cwd(),
        os.uname().nodename,
    )
    check.check_folder(planned.folder)
    listed = len(samples) if all(axis.discrete for axis in request.axes.values()) else None
    watch = Watch(planned, multirun.trial_count(config, listed), max(1, len(places)))
    with lock_output(planned.folder, "auto"):
        check.check_earlier(planned, cards.ALONE if places else ())
        with stop.forward_signals(planned.folder) as stops, watch.watching():
            multirun.run(planned, request.axes, request.search, request.hydra, places)
        print(f"sweep: {planned.folder / 'sweep.md'}")
    if stops.signum is not None:
        return 128 + stops.signum
    states = [record.state for record in records(planned.folder)]
    return int("done" not in states or "failed" in states)


def _folder(output: str | None, config: RunConfig) -> Path:
    named = output or f"outputs/sweeps/{config.model.name}-{config.data.kind}"
    return Path(os.path.abspath(os.path.expanduser(named.strip("'\""))))


def _places(settings: SweepConfig, request: axes.Request, config: RunConfig) -> list[TrialPlace]:
    """The places of trials that run side by side; none where trials run one after the other."""
    if settings.parallel == "none":
        return []
    clash = [text for text in request.hydra if text.lstrip("+").startswith("hydra/launcher=")]
    clash += [key for key in request.axes if key.partition(".")[0] == "launch"]
    if clash:
        raise UserError(
            f"sweep.parallel=cards: {clash[0]}: it says already where trials run; leave one out"
        )
    return cards.places(config)
