"""The benchmark of a start from a cold cache, on files small enough for a test."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_side_reads_all_files(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    small = ["--layers", "3", "--layer-mb", "3", "--turns", "1"]
    places = ["--folder", str(tmp_path), "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, "benchmarks/cold_start.py", *small, *places],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(figures.read_text())
    assert [r["side"] for r in written["results"]] == ["plain", "replicate", "shard", "stream"]
    for result in written["results"]:
        bytes_per_s = result["gb_per_s"] * 1e9
        total = written["settings"]["layers"] * written["settings"]["layer_bytes"]
        assert abs(bytes_per_s * result["seconds"] / total - 1) < 1e-6
    assert not list(tmp_path.glob("fttrain-cold-*")), "the files are gone"
