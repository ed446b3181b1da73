"""The fit benchmark on a tiny shape: every strategy runs from bytes made on the spot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_strategy_runs_and_moves_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_fit70b.py"), "--shape=tiny"]
    command += ["--device=cpu", "--seq-len=32", "--threads=1", "--steps=2", "--accumulation", "2"]
    done = subprocess.run([*command, f"--json={file}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    last = {result["side"].split(",")[0]: result["ranks"][1]["steps"][-1] for result in results}
    for kind, mover in (("gather_bytes", "shard"), ("stage_bytes", "pipeline")):
        assert [side for side, step in last.items() if step[kind]] == [mover]
    assert last["stream"]["h2d_bytes"] > last["shard"]["h2d_bytes"]  # that is the streamed head
    losses = [result["ranks"][0]["steps"][0]["loss"] for result in results]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)  # one model, one data
