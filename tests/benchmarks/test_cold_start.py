"""The benchmark of a start from a cold cache, on files small enough for a test."""

from pathlib import Path

import pytest
from smoke import smoke_run


@pytest.mark.slow
def test_every_side_reads_all_files(tmp_path: Path) -> None:
    small = ("--layers", "3", "--layer-mb", "3", "--turns", "1", "--folder", str(tmp_path))
    done, written = smoke_run("cold_start.py", tmp_path / "figures.json", *small)
    assert done.returncode == 0, done.stderr
    assert [r["side"] for r in written["results"]] == ["plain", "replicate", "shard", "stream"]
    for result in written["results"]:
        bytes_per_s = result["gb_per_s"] * 1e9
        total = written["settings"]["layers"] * written["settings"]["layer_bytes"]
        assert abs(bytes_per_s * result["seconds"] / total - 1) < 1e-6
    assert not list(tmp_path.glob("fttrain-cold-*")), "the files are gone"
