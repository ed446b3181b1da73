"""The script for two cards: a shell can read it, and the settings of its commands compose."""

import os
import subprocess
from pathlib import Path

import doc_commands
import pytest

FILE = Path(__file__).resolve().parents[2] / "examples" / "two_cards.sh"
COMMANDS = ["doctor", "measure", "plan", "train", "train", "evaluate", "report"]


def calls(folder: Path, **environment: str) -> list[str]:
    """What the script would start, written down by a stand-in for fttrain."""
    log, stand_in = folder / "calls", folder / "fttrain"
    stand_in.write_text(f'#!/bin/sh\necho "fttrain $*" >> {log}\n')
    stand_in.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(FILE), "examples.jsonl"],
        check=True,
        env={**os.environ, **environment, "PATH": path},
    )
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    "environment",
    [{}, {"LAUNCH": "2x3090_pcie", "EXPERIMENT": "llama3_70b_2x24gb", "OUTPUT": "outputs/70b"}],
    ids=["8b", "70b"],
)
def test_every_command_composes(tmp_path: Path, environment: dict[str, str]) -> None:
    started = calls(tmp_path, **environment)
    assert [line.split()[1] for line in started] == COMMANDS
    for line in started:
        doc_commands.check_command(line)
    if "EXPERIMENT" in environment:
        assert all(environment["LAUNCH"] in line for line in started[1:6])


def test_it_says_what_it_needs() -> None:
    run = subprocess.run(["bash", str(FILE)], capture_output=True, text=True)
    assert run.returncode != 0
    assert "examples.jsonl" in run.stderr
