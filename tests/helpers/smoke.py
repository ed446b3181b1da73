"""A smoke run of a benchmark, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def smoke_run(
    script: str, figures: Path, *arguments: str
) -> tuple["subprocess.CompletedProcess[str]", dict[str, Any]]:
    """The finished ``benchmarks/script`` and the JSON it left in ``figures``; {} for none."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", "--json", str(figures), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, json.loads(figures.read_text()) if figures.exists() else {}
