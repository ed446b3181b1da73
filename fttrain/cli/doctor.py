"""``fttrain doctor [--json]``: is this machine fit for the run that the settings describe?"""

import json
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fttrain.config.run_config import RunConfig
from fttrain.doctor.checks import RunNeeds, all_checks, examine, summary
from fttrain.doctor.finding import FAILURE, OK, WARNING, Finding

STYLES = {OK: "green", WARNING: "yellow", FAILURE: "bold red"}


def run(config: RunConfig, argv: list[str]) -> int:
    """Makes every check, shows a line each (``--json``: all of them as one JSON object).

    Exit code 0, or 1 where a check failed; warnings are none.
    """
    wanted = RunNeeds(
        config.model,
        config.quant,
        config.lora,
        config.frozen.cache_dir,
        Path(config.output),
        config.checkpoint.keep_last,
    )
    checks = all_checks(config.rig, wanted)
    as_json = "--json" in argv
    out, progress = Console(highlight=False), Console(stderr=True)
    width = max(len(name) for name, _ in checks)
    findings = []
    with progress.status("") as status:

        def tell(name: str, place: int, count: int) -> None:
            status.update(f"check {place + 1} of {count}: {name}")

        for name, found in examine(checks, tell):
            findings.append((name, found))
            if not as_json:
                out.print(line(name, found, width), soft_wrap=True)
    figures = summary(findings)
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        out.print(f"{figures[OK]} ok, {figures[WARNING]} warnings, {figures[FAILURE]} failures")
    return 1 if figures[FAILURE] else 0


def line(name: str, found: Finding, width: int) -> Text:
    """Verdict, name (``width`` characters), figure and, after an arrow, what mends it."""
    text = Text(f"{found.verdict:8}", STYLES[found.verdict])
    text.append(f"{name:{width}}  {found.figure}", "default")
    if found.remedy:
        text.append(f"  -> {found.remedy}", "bold")
    return text
