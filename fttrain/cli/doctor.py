"""``fttrain doctor [--json]``: checks that this machine can do the run of these settings."""

import json

from rich.console import Console
from rich.text import Text

from fttrain.config.run_config import RunConfig
from fttrain.doctor.checks import examine, summary
from fttrain.doctor.finding import FAILURE, OK, WARNING, Finding
from fttrain.training.diagnosis import checks_of

STYLES = {OK: "green", WARNING: "yellow", FAILURE: "bold red"}


def run(config: RunConfig, argv: list[str]) -> int:
    """Make every check and print a line for each (``--json``: one JSON object for all).

    Exit code 0, or 1 where a check failed; a warning is no failure.
    """
    checks = checks_of(config)
    as_json = "--json" in argv
    out, progress = Console(highlight=False), Console(stderr=True)
    width = max(len(name) for name, _ in checks)
    findings = []
    with progress.status("") as status:

        def show(name: str, index: int, count: int) -> None:
            status.update(f"check {index + 1} of {count}: {name}")

        for name, finding in examine(checks, show):
            findings.append((name, finding))
            if not as_json:
                out.print(line(name, finding, width), soft_wrap=True)
    figures = summary(findings)
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        out.print(f"{figures[OK]} ok, {figures[WARNING]} warnings, {figures[FAILURE]} failures")
    return 1 if figures[FAILURE] else 0


def line(name: str, finding: Finding, width: int) -> Text:
    """Verdict, name (``width`` characters), figure and, after an arrow, the remedy."""
    text = Text(f"{finding.verdict:8}", STYLES[finding.verdict])
    text.append(f"{name:{width}}  {finding.figure}", "default")
    if finding.remedy:
        text.append(f"  -> {finding.remedy}", "bold")
    return text
