"""A smoke run of a benchmark, in a process of its own."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes

ROOT = Path(__file__).parents[2]


Done = tuple["subprocess.CompletedProcess[str]", dict[str, Any]]


def smoke_run(script: str, figures: Path, *arguments: str) -> Done:
    """The finished ``benchmarks/script`` and the JSON it left in ``figures``; {} for none."""
    done = subprocess.run(
        [sys.executable, *_argv(script, figures, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, _written(figures)


def quick_run(script: str, figures: Path, *arguments: str) -> Done:
    """``smoke_run`` without the seconds of the imports, where no memory of the script's process is
    measured: that of a fork has more in it.
    """
    done = processes.run(_main, _argv(script, figures, arguments))
    return done, _written(figures)


def _argv(script: str, figures: Path, arguments: tuple[str, ...]) -> list[str]:
    return [f"benchmarks/{script}", "--json", str(figures), *arguments]


def _written(figures: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(figures.read_text()) if figures.exists() else {}
    return written


def _main(argv: list[str]) -> None:
    os.chdir(ROOT)
    sys.argv = argv
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as the interpreter does for a script
    runpy.run_path(argv[0], run_name="__main__")
