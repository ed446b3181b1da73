"""``fttrain plan [--table]``: memory and speed of every strategy, before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path

from fttrain.config.run_config import RunConfig

WIDE = 150  # columns


def run(config: RunConfig, argv: Sequence[str] = ()) -> int:
    """Plan ``config`` for the rig that ``rig.profile`` names, without downloading weights. With
    ``--table``: print the memory of models of common sizes.

    Raises UserError, after printing the figures, where no strategy fits.
    """
    # Late: these load torch and transformers, which help does not need.
    from rich.console import Console

    if "--table" in argv:
        return _sizes(argv)
    from fttrain.plan.suggestions import suggest_change
    from fttrain.plan.table import notes, parts_table, summary, table
    from fttrain.track import counting
    from fttrain.training.planning import plan_run
    from fttrain.util.atomic_files import write_json
    from fttrain.util.errors import UserError

    plan = plan_run(config, counting("planning"))
    rig, steps = plan.rig, plan.steps
    console = Console()
    if not console.is_terminal:  # a file has room for the table
        console = Console(width=WIDE)
    console.print(table(plan.candidates, rig, steps))
    for line in notes(rig, plan.disk, steps, plan.documents):
        console.print(line, highlight=False)
    shown = next((candidate for candidate in plan.candidates if candidate.memory), None)
    if shown is not None:
        console.print(parts_table(shown, rig))
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "plan.json", plan.to_json())
    best = plan.candidates[0]
    if not best.fits:
        raise UserError(
            f"{config.model.name} does not fit {rig.name}; nearest is {best.settings}: "
            f"{best.reason}; {suggest_change(best, plan.architecture, rig)}"
        )
    console.print(summary(best, rig, steps), highlight=False)
    return 0


def _sizes(argv: Sequence[str]) -> int:
    """Print the memory of models of common sizes, beside published figures; write no file."""
    from rich.console import Console

    from fttrain.plan.sizes_table import show
    from fttrain.track import counting
    from fttrain.util.errors import UserError

    if settings := [text for text in argv[1:] if text != "--table"]:
        raise UserError(f"plan --table: {settings[0]}: it takes no settings; leave it out")
    console = Console()
    if not console.is_terminal:  # a file has room for the tables
        console = Console(width=WIDE)
    show(console, counting("computing", Console(stderr=True)))
    return 0
