"""``fttrain measure``: the rates of this machine, as a profile for plans."""

import time
from pathlib import Path

from fttrain.config.run_config import RunConfig
from fttrain.launcher import launch


def run(config: RunConfig, argv: list[str]) -> int:
    """Measure cards, host and links at the sizes of ``config.model``; the exit code is 1 where a
    link is wrong.

    The profile goes to rig_N.json in the cache folder, N for the number of ranks, and beside
    measure.md into ``config.output``.
    """
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    # Late: these load torch and transformers, and a launcher does without.
    from rich.console import Console

    from fttrain.plan.links import step_table
    from fttrain.rig.measure_report import closing_line, tables, write_report
    from fttrain.training.measuring import measure_rig

    started = time.monotonic()
    measurement = measure_rig(config)
    profile, shapes = measurement.profile, measurement.shapes
    if measurement.is_main:
        console = Console()
        over_links = step_table(config.strategy_spec(), measurement.architecture, profile)
        printed = [*tables(profile, shapes), *([over_links] if over_links else [])]
        for table in printed:
            table.show(console)
        print(f"{closing_line(profile, time.monotonic() - started)}\nprofile: {measurement.path}")
        print(f"report: {write_report(Path(config.output), profile, shapes, printed)}")
    return int(any(link.wrong for link in profile.links))
