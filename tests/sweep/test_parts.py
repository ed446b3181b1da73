"""Names of trials, visible cards, what a child says, the best trial's file, the plots."""

import os
import time
from pathlib import Path

import pytest
import tiny_sweep

from fttrain.config.run_config import compose, compose_values
from fttrain.sweep import axes, cards, child
from fttrain.sweep.best import FILE, write_best
from fttrain.sweep.config import Sweep, SweepConfig
from fttrain.sweep.plots import plot_parameters
from fttrain.sweep.record import Record, trial_name
from fttrain.sweep.trial import identity


def test_names_are_readable_and_never_the_same_for_two_trials() -> None:
    assert trial_name(["lora.r=8", "optim.lr=0.0001"]) == "lora.r=8_optim.lr=0.0001"
    assert trial_name(["optim.lr_schedule='linear'"]) == "optim.lr_schedule=linear"
    close = [trial_name([f"optim.lr={0.000123456789 + i * 1e-12}"]) for i in range(2)]
    assert all(name.startswith("optim.lr=0.000123457-") for name in close)
    long = [trial_name([f"model.path='/{'x' * 200}/{i}'"]) for i in range(2)]
    odd = [trial_name([f"model.path='a{sign}b'"]) for sign in "/ ,_"]
    for names in (close, long, odd):
        assert len(set(names)) == len(names)
        assert all("/" not in name and len(name) < 100 for name in names)


def combinations(*overrides: str) -> list[list[str]]:
    return axes.combinations(axes.read(overrides).axes)


def test_values_that_differ() -> None:
    assert combinations("lora.r=8,16", "optim.lr=1e-4,2e-4")[1] == ["lora.r=8", "optim.lr=0.0002"]
    assert combinations("lora.r=range(8,33,8)") == [[f"lora.r={r}"] for r in (8, 16, 24, 32)]
    assert combinations("optim=glob(*8bit)") == [
        ["optim=adamw8bit"],
        ["optim=lion8bit"],
        ["optim=paged_adamw8bit"],
    ]
    modules = combinations("lora.target_modules=[q_proj],[q_proj,v_proj]")
    assert modules[1] == ["lora.target_modules=[q_proj,v_proj]"]
    assert combinations("lora.r=8,16", "lora.r=4,32") == [["lora.r=4"], ["lora.r=32"]]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.path=a b,c", ["a b", "c"]),
        ("model.revision=1e5,2", ["1e5", "2"]),
        ("model.path='a,b',c", ["a,b", "c"]),
        ("model.path=choice(a,b)", ["a", "b"]),
        ("model.path=~/x,/y", [os.path.expanduser("~/x"), "/y"]),
    ],
)
def test_text_that_differs_stays_as_it_was_typed(typed: str, meant: list[str]) -> None:
    key = typed.partition("=")[0].removeprefix("model.")
    found = [compose(["model=local", "model.path=z", *one]).model for one in combinations(typed)]
    assert [getattr(model, key) for model in found] == meant


@pytest.mark.parametrize("typed", ["output='a,b'", "model.path='x, y'", "model.path=f(x y"])
def test_text_that_does_not_differ(typed: str) -> None:
    assert not axes.read([typed]).axes


def test_visible_cards_are_cudas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "ask", lambda question: 3)
    assert cards.visible_cards({}) == ["0", "1", "2"]
    assert cards.visible_cards({"CUDA_VISIBLE_DEVICES": "2, 0"}) == ["2", "0"]
    assert cards.visible_cards({"CUDA_VISIBLE_DEVICES": "1,-1,0"}) == ["1"]
    assert cards.visible_cards({"CUDA_VISIBLE_DEVICES": ""}) == []


SECRET = "some-private-words"


def test_what_a_child_says_is_kept_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nprint('12 steps of 4 rows')\nprint('token {SECRET}')\nsys.stdout.flush()\n"
        f"print('fttrain: error: no {SECRET} here', file=sys.stderr)\nsys.exit(5)\n"
    )
    monkeypatch.setattr(child, "PROGRAM", (tiny_sweep.QUICK[0], str(program)))
    trial = child.Child(["train"], tmp_path / "log", tmp_path)
    deadline = time.monotonic() + tiny_sweep.WAIT_S
    while (code := trial.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (code, trial.total_steps) == (5, 12)
    assert trial.reason(5) == "no [redacted] here"
    assert (tmp_path / "log").read_text().splitlines() == [
        "12 steps of 4 rows",
        "token [redacted]",
        "fttrain: error: no [redacted] here",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=demo", "lora.r=8", "loop.max_steps=7"],
        ["model=qwen3_8b", "strategy=pipeline", "optim=adamw8bit", "launch=cpu_demo"],
        ["model=local", "model.path=a b", "data=file", "data.path=x.jsonl", "lora=dora"],
        ["activations=[keep*2,recompute*28]", "lora.target_modules=[q_proj]", "optim.lr=1e-5"],
    ],
)
def test_the_best_trial_can_be_composed_again(tmp_path: Path, overrides: list[str]) -> None:
    """And given other settings on top."""
    _, choices = compose_values(overrides)
    settings = identity(compose(overrides))
    record = Record("best", [], settings, choices, "done", 1.25)
    sweep = Sweep(tmp_path, tuple(overrides), SweepConfig(), tmp_path, "here")
    write_best(sweep, record)
    assert identity(compose([f"experiment={tmp_path / FILE}"])) == settings
    assert compose([f"experiment={tmp_path / FILE}", "lora.r=3"]).lora.r == 3
    text = (tmp_path / FILE).read_text()
    assert text.startswith("# @package _global_\n")
    assert "1.25" in text
    assert "output" not in text


def test_a_panel_for_each_setting_that_differs(tmp_path: Path) -> None:
    done = [
        Record(str(i), [f"optim.lr={lr}", f"lora={kind}", "lora.r=8"], state="done", value=value)
        for i, (lr, kind, value) in enumerate([(1e-5, "dora", 1.0), (1e-2, "default", 2.0)])
    ]
    assert plot_parameters(tmp_path / "plot.png", done, "NLL")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_parameters(tmp_path / "none.png", done[:1], "NLL")
    assert not (tmp_path / "none.png").exists()
