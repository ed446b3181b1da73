"""metrics.jsonl must stay readable for strict parsers after kills, full disks and resumes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from fttrain.track import MetricsFile, read_metrics
from fttrain.util.errors import UserError


def strict(text: str) -> list[dict[str, Any]]:
    """Every line as a parser reads it that knows no NaN."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_line_is_strict_json_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log(1, {"loss": float("nan"), "lr": 2e-4, "grad_norm": float("inf"), "kernel": "sdpa"})
    file.log(2, {"loss": torch.tensor(0.5), "tokens": np.int64(7), "low": -float("inf")})
    lines = strict(path.read_text())  # before finish: a reader sees each step as it is logged
    assert lines == [
        {"step": 1, "loss": None, "lr": 2e-4, "grad_norm": None, "kernel": "sdpa"},
        {"step": 2, "loss": 0.5, "tokens": 7, "low": None},
    ]
    file.finish()
    assert read_metrics(path) == lines


def test_a_resume_drops_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.log(step, {"loss": step})
    file.log(5, {"holdout_nll": 1.5})
    file.finish()
    with path.open("a") as half:
        half.write('{"step": 8, "lo')
    file = MetricsFile(path, resumed_step=5)
    assert [line["step"] for line in strict(path.read_text())] == [1, 2, 3, 4, 5]
    file.log(6, {"loss": 60})
    file.finish()
    assert read_metrics(path)[-2:] == [
        {"step": 5, "loss": 5, "holdout_nll": 1.5},
        {"step": 6, "loss": 60},
    ]
    MetricsFile(path).finish()
    assert path.read_text() == "", "a fresh start leaves nothing of an earlier one"


def test_reading_passes_over_what_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    good = [b'{"step": 1}', b'{"step": 2, "loss": 3.5}']
    bad = [b"", b"\0\0\0", b'{"step": 9', b"[1]", b'{"loss": 1}', b'{"step": null}', b"\xff\xfe"]
    path.write_bytes(b"\n".join([good[0], *bad, good[1], b'{"step": 3, "l']))
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 3.5}]


ENDLESS = """
import sys
from fttrain.track import MetricsFile
file = MetricsFile(sys.argv[1])
for step in range(1, 10**9):
    file.log(step, {"loss": 1.0, "text": "x" * (step % 300)})
    if step == 200:
        print("many", flush=True)
"""


def test_a_kill_tears_at_most_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", ENDLESS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "many\n"
        writer.kill()
    lines = path.read_text().split("\n")
    assert [line["step"] for line in strict("\n".join(lines[:-1]))] == list(range(1, len(lines)))
    MetricsFile(path, resumed_step=100).finish()
    assert len(strict(path.read_text())) == 100


FULL = """
import resource, sys
from fttrain.track import MetricsFile
said = []
file = MetricsFile(sys.argv[1], warn=said.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
for step in range(1, 200):
    if step == 150:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    file.log(step, {"loss": 1.0, "text": "x" * 31})
file.finish()
print(len(said), said[0])
"""


def test_a_full_disk_costs_lines_and_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ")
    assert "cannot be written (File too large)" in done.stdout
    steps = [line["step"] for line in read_metrics(path)]
    assert steps[-50:] == list(range(150, 200)), "it goes on once there is room again"
    assert steps[:30] == list(range(1, 31))


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/metrics\.jsonl: cannot be written"):
        MetricsFile(tmp_path / "nowhere" / "metrics.jsonl")
