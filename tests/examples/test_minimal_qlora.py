"""The core on one page runs, and its loss falls."""

import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "examples" / "minimal_qlora.py"
LINES_AT_MOST = 120


def test_it_stays_a_page() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= LINES_AT_MOST


def test_the_loss_falls() -> None:
    command = [sys.executable, str(FILE)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    steps = [line.split() for line in run.stdout.splitlines() if line.startswith("step")]
    losses = [float(words[words.index("loss") + 1]) for words in steps]
    assert len(losses) == 20
    assert losses[-1] < 0.2 * losses[0]
    assert "frozen base" in run.stdout
