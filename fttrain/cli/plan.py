"""``fttrain plan [--table]``: memory and speed of every strategy, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fttrain.config.run_config import RunConfig
from fttrain.launcher import launch

WIDE = 150  # columns


def run(config: RunConfig, argv: Sequence[str] = ()) -> int:
    """Plan ``config`` for the rig that ``rig.profile`` names, without downloading weights. With
    ``--table``: the memory of models of common sizes.

    Raises UserError where nothing fits, after the figures.
    """
    # Late: these load torch and transformers, and help does without.
    from rich.console import Console

    if "--table" in argv:
        return _sizes(argv)
    from fttrain.frozen.source import check_length
    from fttrain.model.decoder import Architecture
    from fttrain.plan.architectures import planned_config
    from fttrain.plan.choose import candidates, choose
    from fttrain.plan.cost import disk, run_steps, training_rows
    from fttrain.plan.rigs import find_rig
    from fttrain.plan.suggestions import suggest_change
    from fttrain.plan.table import as_json, notes, parts_table, summary, table
    from fttrain.strategy.zero_config import DEEPSPEED
    from fttrain.track import counting
    from fttrain.training.session import strategy_spec
    from fttrain.util.atomic_files import write_json
    from fttrain.util.errors import UserError

    if config.strategy.name == DEEPSPEED:
        raise UserError(
            f"plan: strategy={DEEPSPEED}: what DeepSpeed takes is not computed; "
            "`fttrain train dry_run=20` measures it"
        )
    ranks = launch.ranks_wanted(config.launch)
    rig = find_rig(config.rig.profile, config.frozen.cache_dir, ranks)
    model = planned_config(config.model)
    check_length(config.data.seq_len, model)
    spec, architecture, loop = strategy_spec(config), Architecture(model), config.loop
    rows_per_step = loop.micro_batch_size * loop.gradient_accumulation_steps * len(rig.cards)
    rows = training_rows(config.model, config.data)
    count = documents = None
    if rows is not None:
        count, documents = len(rows), int(rows.row_documents.max(initial=1))
        share = rows.target_share
        spec = replace(spec, size=replace(spec.size, target_share=share, row_documents=documents))
    steps = run_steps(loop.max_steps, loop.epochs, count, rows_per_step)
    stored = disk(spec, architecture, config.checkpoint.keep_last)
    specs = list(candidates(spec, len(rig.cards)))
    ranking = choose(specs, architecture, rig, counting("planning"))
    console = Console()
    if not console.is_terminal:  # a file has room for the table
        console = Console(width=WIDE)
    console.print(table(ranking, rig, steps))
    for line in notes(rig, stored, steps, documents):
        console.print(line, highlight=False)
    shown = next((candidate for candidate in ranking if candidate.memory), None)
    if shown is not None:
        console.print(parts_table(shown, rig))
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "plan.json", as_json(ranking, rig, config.model.name, stored, steps))
    best = ranking[0]
    if not best.fits:
        raise UserError(
            f"{config.model.name} does not fit {rig.name}; nearest is {best.settings}: "
            f"{best.reason}; {suggest_change(best, architecture, rig)}"
        )
    console.print(summary(best, rig, steps), highlight=False)
    return 0


def _sizes(argv: Sequence[str]) -> int:
    """Print the memory of models of common sizes beside published figures; write nothing."""
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
