"""What is wrong with a sweep is said in one line, before its first trial."""

import json
from pathlib import Path

import pytest
from tiny_sweep import pids, run

from fttrain.checkpoint.output_lock import lock_output

RATES = "optim.lr=1e-4,2e-4"
OPTUNA = f"{RATES} hydra/sweeper=optuna"
WRONG = {
    "": "-m: nothing differs between trials",
    "optim.lr=[1e-4]": "nothing differs between trials",
    f"{RATES} optim.lrr=3": "optim.lrr: no such key; did you mean optim.lr?",
    "optim.lrr=3,4": "optim.lrr: no such key; did you mean optim.lr?",
    "optim.lr=1e-4,fast": "trial optim.lr=fast: optim.lr='fast': a number is wanted",
    "optim.lr=1e-4,,2": "optim.lr=1e-4,,2: cannot be read",
    "optim.lr_schedule=linear,cosin": "trial optim.lr_schedule=cosin: optim.lr_schedule=cosin: con",
    "schedule.micro_batch_group=2,8": "trial schedule.micro_batch_group=8: "
    "schedule.micro_batch_group=8: more than",
    "lora=default,dorra": "lora=dorra: no such option; did you mean dora?",
    "lora=glob(zz*)": "lora=glob(zz*): there are only default, dora, none, rslora",
    "optim.lr=glob(*)": "optim.lr=glob(*): glob is of groups",
    "lora.r=range(8,8)": "lora.r=range(8,8): no value is in this range",
    "optim.lr=interval(1e-4,1e-3)": "an interval is for a sweeper that chooses values",
    "optim.lr=interval(0,fast) hydra/sweeper=optuna": "optim.lr=interval(0,fast): cannot be read",
    "lora.r=interval(1,8) hydra/sweeper=optuna": "write int(interval(1,64))",
    "lora.r=int(interval(0,8)) hydra/sweeper=optuna": "trial lora.r=0: lora.r=0",
    f"{RATES} data.holdout=0": "sweep.objective=holdout_nll: data.holdout=0 leaves nothing to",
    f"{RATES} sweep.objective=accuracy": "sweep.objective=accuracy: holdout_nll, train_loss",
    f"{RATES} sweep.prunn=median": "sweep.prunn: no such key; did you mean sweep.prune?",
    f"{RATES} sweep.prune=median sweep.objective=step_s": "it compares losses",
    f"{RATES} sweep.prune_warmup=1": "sweep.prune_warmup=1.0: a share in [0, 1)",
    f"{RATES} sweep.prune=none,median": "sweep.prune=none,median: one value is wanted",
    f"{RATES} sweep=nope": "sweep=nope: no such option",
    f"{RATES} sweep=nowhere/my.yaml": "sweep=nowhere/my.yaml: there is no such file",
    f"{RATES} hydra/sweeper=ax": "Could not find 'hydra/sweeper/ax'",
    f"{RATES} hydra/launcher=joblib": "Could not find 'hydra/launcher/joblib'",
    f"{RATES} hydra.run.dir=x": "of Hydra a sweep takes hydra/sweeper",
    f"{RATES} hydra.sweeper._target_=os.system": "nothing that names code",
    f"{RATES} hydra/job_logging=default": "of Hydra a sweep takes hydra/sweeper",
    f"{RATES} hydra.sweeper.nope=3": "Could not override 'hydra.sweeper.nope'",
    f"{OPTUNA} hydra.sweeper.n_trials=3,4": "hydra.sweeper.n_trials=3,4: one value is wanted",
    f"{OPTUNA} hydra.sweeper.direction=maximize": "is always minimised",
    f"{OPTUNA} hydra.sweeper.storage=sqlite": "hydra.sweeper.storage: not taken",
    f"{OPTUNA} hydra.sweeper.custom_search_space=os.system": "nothing that names code",
    f"{RATES} sweep.parallel=cards": "nothing runs side by side",
    f"{RATES} sweep.parallel=cards hydra/launcher=ray": "hydra/launcher=ray: it says already where",
    "launch.processes=1,2 sweep.parallel=cards": "launch.processes: it says already where",
    f"{RATES} resume=none": "resume=none: not of a sweep",
    f"{RATES} dry_run=5": "dry_run=5: not of a sweep",
    "track.name=a,b": "track.name=a,b: one value is wanted: trials cannot differ in it",
    "experiment=x/a.yaml,demo": "experiment=x/a.yaml: a file cannot be one of several",
    f"{RATES} experiment=x/a.yaml": "experiment=x/a.yaml: there is no such file",
    f"{RATES} WANDB_API_KEY=abc": "secrets do not belong on a command line",
    f"{RATES} hydra.launcher.token=abc": "secrets do not belong on a command line",
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("overrides", WRONG)
def test_what_is_wrong_is_said_before_the_first_trial(
    overrides: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "sweep", *overrides.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("fttrain: error: ")
    assert WRONG[overrides] in told
    assert told.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hydra:\n  callbacks: {x: {a: 1}}\n", "of hydra it may set sweeper and launcher"),
        ("hydra:\n  sweeper: {sampler: {_target_: os.system}}\n", "_target_: refused"),
        ("loop:\n  max_steps: 3\n", "loop: a search has hydra.sweeper, hydra.launcher and sweep"),
        ("defaults:\n  - override /model: llama3_8b\n", "only override /hydra/..."),
        ("sweep: {prunn: median}\n", "sweep.prunn: no such key; did you mean sweep.prune?"),
        ("sweep: {prune: median\n", "not YAML"),
        ("- a\n", "wanted is a group of keys"),
    ],
)
def test_a_wrong_search_file(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(text)
    assert run(tmp_path / "sweep", RATES, f"sweep={file}") == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_search_from_a_file_and_the_command_line_over_it(tmp_path: Path) -> None:
    """Its settings, its axes, and those that the command line changes or fixes."""
    file, output = tmp_path / "search.yaml", tmp_path / "sweep"
    lines = ["optim.lr: 1e-4,1e-3", "lora.r: 8,16", "optim.lr_schedule: linear,cosine"]
    file.write_text(
        "# @package _global_\nsweep: {objective: train_loss}\nhydra:\n  sweeper:\n    params:\n"
        + "".join(f"      {line}\n" for line in lines)
    )
    assert run(output, f"sweep={file}", "lora.r=4", "optim.lr_schedule=constant,linear") == 0
    found = json.loads((output / "sweep.json").read_text())
    assert found["objective"] == "train_loss"
    assert {tuple(sorted(row["overrides"].items())) for row in found["trials"]} == {
        (("optim.lr", rate), ("optim.lr_schedule", schedule))
        for rate in ("0.0001", "0.001")
        for schedule in ("constant", "linear")
    }
    assert "lora.r=4" in found["fixed"]


def test_the_folder_is_no_other_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not another sweep's that still runs, nor a run's."""
    with lock_output(tmp_path / "busy", "auto"):
        assert run(tmp_path / "busy", RATES) == 2
    assert "is writing there" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert run(tmp_path / "run", RATES) == 2
    assert "already holds a run (metrics.jsonl): a sweep needs a folder" in capsys.readouterr().err
    assert not pids(tmp_path / "busy") + pids(tmp_path / "run")


@pytest.mark.usefixtures("quick")
def test_other_settings_into_the_same_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More values are welcome: the trials that are there can be compared with them."""
    output = tmp_path / "sweep"
    assert run(output, "lora.r=8") == 2
    assert run(output, "lora.r=range(8,9)") == 0
    capsys.readouterr()
    assert run(output, "lora.r=8,16", "optim.lr=3e-4") == 2
    told = capsys.readouterr().err
    assert "trial lora.r=8 was made with other settings: optim.lr was" in told
    assert "is 0.0003 now" in told
    assert run(output, "lora.r=8,16", "track.memory_every=3") == 0
    assert len(pids(output)) == 2
