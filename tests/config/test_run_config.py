"""The configuration: what composes, what is refused and how, what is never written."""

import dataclasses
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from fttrain.config import groups, run_config
from fttrain.config.run_config import RunConfig, compose, to_yaml
from fttrain.util import schema
from fttrain.util.errors import UserError
from fttrain.util.paths import conf_folder

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {  # options that ask for a path of the user's
    ("model", "local"): ["model.path=/models/mine"],
    ("data", "file"): ["data.path=examples.jsonl"],
    ("data", "hub"): ["data.path=org/name"],
    ("schedule", "one_f_one_b"): ["strategy=pipeline"],
    ("lora", "none"): ["strategy=deepspeed", "quant=none"],
}
WITH_DEEPSPEED = (("optim", "deepspeed_cpu_adam"), ("strategy", "deepspeed"), ("lora", "none"))
MARKS = dict.fromkeys(WITH_DEEPSPEED, pytest.mark.deepspeed)
OPTIONS = [
    pytest.param(group, option, marks=MARKS.get((group, option), ()))
    for group, found in groups.groups().items()
    for option in found
    if group != "sweep"  # of many runs: tests/sweep/test_search.py
]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    composed = compose([f"{group}={option}", *NEEDS.get((group, option), [])])
    assert isinstance(composed, RunConfig)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_file_states_every_key_with_a_comment(group: str, option: str) -> None:
    text = (conf_folder() / group / f"{option}.yaml").read_text(encoding="utf-8")
    if group == "experiment":
        return  # changes some keys only
    hint = schema.lookup(RunConfig, [group])
    keys = [key for key in yaml.safe_load(text) if key != "defaults"]
    assert keys == schema.keys_of(hint)
    bare = [
        line for line in text.splitlines() if line and not line.startswith("#") and "#" not in line
    ]
    assert all(line.startswith(("path:", "name:", "kind:", "defaults:")) for line in bare), bare


def test_defaults_of_the_files_are_the_defaults_of_the_code() -> None:
    composed = compose()
    for field in dataclasses.fields(RunConfig):
        part = getattr(composed, field.name)
        if not dataclasses.is_dataclass(part) or field.name == "model":
            continue
        assert part == type(part)(), field.name


def test_it_is_frozen_all_the_way_down() -> None:
    composed = compose()
    for part in (composed, composed.optim):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.output = "elsewhere"  # type: ignore[misc,union-attr]
    assert isinstance(composed.optim.betas, tuple)


@pytest.mark.parametrize("written", ["1e-4", "'1e-4'", '"1e-4"', "0.0001", "1E-4", ".0001"])
def test_a_learning_rate_in_any_spelling(written: str) -> None:
    assert compose([f"optim.lr={written}"]).optim.lr == 1e-4


def test_a_learning_rate_that_yaml_reads_as_a_string() -> None:
    values = yaml.safe_load("lr: 1e-4")
    assert isinstance(values["lr"], str)
    assert schema.build(type(compose().optim), values, "optim").lr == 1e-4


def test_values_of_mixed_types() -> None:
    assert compose(["schedule.micro_batch_group=2"]).schedule.micro_batch_group == 2
    assert compose(["schedule.micro_batch_group=all"]).schedule.micro_batch_group == "all"
    assert compose(["lora.target_modules=[q_proj,v_proj]"]).lora.target_modules == (
        "q_proj",
        "v_proj",
    )
    assert compose(["lora.lora_alpha=8"]).lora.lora_alpha == 8.0
    assert compose(["loop.max_steps=1e3"]).loop.max_steps == 1000
    assert compose(["loop.max_steps=null"]).loop.max_steps is None
    assert compose(["optim.betas=[0.9,0.95]"]).optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    "path",
    [
        "2024",
        "1e5",
        "runs/a=b (1).x",
        "a,b",
        "true",
        "it's",
        "C:\\runs",
        "C:\\it's\\\\'\\",
        "[x] y",
    ],
)
def test_text_stays_as_it_was_typed(path: str) -> None:
    assert compose([f"output={path}"]).output == path


def test_the_home_folder_is_found() -> None:
    assert compose(["output=~/runs"]).output == os.path.expanduser("~/runs")


def test_the_last_word_counts() -> None:
    composed = compose(
        ["experiment=demo", "model=llama3_8b", "model=qwen2_7b", "optim.lr=1", "optim.lr=2"]
    )
    assert (composed.model.name, composed.optim.lr, composed.output) == (
        "qwen2_7b",
        2.0,
        "outputs/demo",
    )
    assert compose(["experiment=demo", "experiment=null"]) == compose()


WRONG = {
    "optim.lrr=1": "optim.lrr: no such key; did you mean optim.lr?",
    "optm.lr=1": "optm.lr: no such key; did you mean optim.lr?",
    "lora.rank=8": "lora.rank: no such key; allowed: r, lora_alpha",
    "epochs=3": "epochs: no such key; allowed: model, quant",
    "loop.epochs.x=3": "loop.epochs is a single value",
    "optim.lr=fast": "optim.lr='fast': a number is wanted",
    "optim.lr=-1": "optim.lr=-1",
    "optim.lr=nan": "optim.lr=nan: a number is wanted",
    "optim.lr=null": "optim.lr=null: a number is wanted",
    "optim.lr=true": "optim.lr=true: a number is wanted",
    "optim.lr=[1]": "optim.lr=[1]: a number is wanted",
    "optim.lr={a:1}": "optim.lr={'a': 1}: a number is wanted",
    "optim.lr=": "optim.lr='': a number is wanted",
    "optim.betas=[0.9]": "optim.betas=[0.9]: a list of 2",
    "optim.betas=[0.9": "optim.betas=[0.9: cannot be read",
    "lora.r=16.5": "lora.r=16.5: a whole number is wanted",
    "lora.r=0": "lora.r=0 with strategy=replicate: its base is frozen; strategy=deepspeed trains",
    "lora.r=8,16": "one value is wanted; a list is written 'lora.r=[8,16]', and `fttrain train -m`",
    "sweep=lora_lr": "'sweep=lora_lr': a sweep is started with `fttrain train -m`",
    "sweep.prune=median": "'sweep.prune=median': a sweep is started with `fttrain train -m`",
    "lora.target_modules=q_proj,v_proj": "a list is written 'lora.target_modules=[q_proj,v_proj]'",
    "lora.lora_dropout=1.5": "lora.lora_dropout=1.5",
    "data.packing=yes": "data.packing='yes': true or false is wanted",
    "data.seq_len=0": "data.seq_len=0",
    "data.holdout=1": "data.holdout=1",
    "loop.micro_batch_size=0": "loop.micro_batch_size=0",
    "schedule.micro_batch_group=two": "schedule.micro_batch_group=two",
    "strategy=pipeline schedule.micro_batch_group=2": "schedule.micro_batch_group=2: one_f_one_b "
    "passes micro-batches one",
    "schedule.micro_batch_group=8": "schedule.micro_batch_group=8: more than "
    "loop.gradient_accumulation_steps=4",
    "launch.processes=0": "launch.processes=0",
    "activations=all": "activations=all: recompute, keep, offload, or a list of them by layer",
    "activations=[keep,drop*2]": "activations=[keep,drop*2]: recompute, keep, offload, or a list",
    "activations=[]": "activations is empty",
    "output=": "output is empty",
    "resume=": "resume is empty",
    "output=${nothing}": "Interpolation key 'nothing' not found",
    "output=${oops": "cannot be read",
    "quant.kind=none": "write quant=none",
    "quant.blocksize=100": "quant.blocksize=100",
    "model=llama3_8": "model=llama3_8: no such option; did you mean llama3_8b?",
    "model=": "model=: no such option",
    "model=null": "model=null: no such option",
    "model=local": "model.path is not set",
    "data=file": "data.path is not set",
    "experiment=dmo": "did you mean demo?",
    "experiment=nowhere/mine.yaml": "experiment=nowhere/mine.yaml: there is no such file",
    "experiment=.yaml/": "experiment=.yaml/: there is no such file",
    "loop={epochs:3}": "no such option",
    "strategy.zero.stage=3": r"strategy=replicate: strategy.zero.* belongs to strategy=deepspeed",
    "strategy.zero.stge=3": "did you mean strategy.zero.stage?",
    "strategy=shrad": "strategy=shrad: no such option; did you mean shard?",
    "strategy.name=pipeline": "strategy=pipeline with schedule=grouped: they do not go together",
    "strategy.resident_layers=4": "strategy.resident_layers and strategy.slots belong to",
    "strategy.slots=3": "strategy.resident_layers and strategy.slots belong to strategy=stream",
    "layer_inputs=disk": "layer_inputs=disk: device or host",
    "embedding=disk": "embedding=disk: device or host",
    "lm_head=disk": "lm_head=disk: device, host or quantized",
    "mlp_tile_tokens=100": "mlp_tile_tokens=100: all, or a multiple of 1024 tokens such as 4096",
    "kernels=triton": "kernels=triton: auto, torch or liger",
    "mlp_tile_tokens=half": "mlp_tile_tokens=half: all, or a multiple of 1024",
    "frozen.verify_every=-1": "frozen.verify_every=-1: 0 or more steps",
    "optim=lion": "optim=lion: no such option",
    "nonsense": "write key=value or group=option",
    "=3": "write key=value or group=option",
    "--lr=3": "write key=value or group=option",
    "~lora.r": "write key=value or group=option",
    "hydra.run.dir=x": "only fttrain's own settings",
    "model@other=llama3_8b": "only fttrain's own settings",
    "model._target_=os.system": "model._target_: refused: settings never name code",
    "+_target_=os.system": "_target_: refused: settings never name code",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_is_said_in_one_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(override.split())
    assert WRONG[override] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ to spoil."""
    copy = tmp_path / "conf"
    for path in conf_folder().rglob("*.yaml"):
        target = copy / path.relative_to(conf_folder())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for module in (run_config, groups):
        monkeypatch.setattr(module, "conf_folder", lambda: copy)
    return copy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", "optim.lrr: no such key; did you mean optim.lr?"),
        ("optim: 3\n", "optim=3: wanted is a group of keys: kind, lr"),
        ("optimm:\n  lr: 1\n", "optimm: no such key; did you mean optim?"),
        ("model:\n  _target_: os.system\n", "model._target_: refused"),
        ("optim: {lr: 1\n", "not YAML"),
        ("optim:\n  lr: 1\n  lr: 2\n", "not YAML"),
        ("defaults:\n  - override /model: nope\n", "nope"),
        ("output: ${optim.nope}\n", "nope"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(own_conf: Path, text: str, message: str) -> None:
    (own_conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n" + text, encoding="utf-8"
    )
    with pytest.raises(UserError) as caught:
        compose(["experiment=mine"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", "optim.lrr: no such key; did you mean optim.lr?"),
        ("model:\n  _target_: os.system\n", "model._target_: refused"),
        ("optim: {lr: 1\n", "mine.yaml: not YAML"),
        ("optim:\n  lr: 1\n  lr: 2\n", "mine.yaml: not YAML"),
        ("- optim\n", "mine.yaml: wanted is a group of keys"),
        ("hydra:\n  sweeper: {}\n", "mine.yaml: a search belongs into a file of its own"),
        ("defaults:\n  - override /model: nope\n", "nope"),
    ],
)
def test_a_wrong_experiment_file_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        compose([f"experiment={tmp_path / 'mine.yaml'}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_experiment_may_be_any_file(tmp_path: Path) -> None:
    """As if it lay in conf/experiment; an edit counts, and so does what follows."""
    file = tmp_path / "my recipe.yaml"
    file.write_bytes((conf_folder() / "experiment" / "demo.yaml").read_bytes())
    assert compose([f"experiment={file}"]) == compose(["experiment=demo"])
    file.write_text("# @package _global_\ndefaults:\n  - override /lora: dora\noptim: {lr: 1e-2}\n")
    composed = compose([f"experiment={file}", "lora.r=3"])
    assert (composed.lora.use_dora, composed.lora.r, composed.optim.lr) == (True, 3, 1e-2)


def test_a_file_may_leave_out_what_has_a_default(own_conf: Path) -> None:
    (own_conf / "optim" / "adamw.yaml").write_text("lr: 1e-4\n", encoding="utf-8")
    assert compose(["optim.eps=1e-6"]).optim.lr == 1e-4
    assert compose(["optim.eps=1e-6"]).optim.eps == 1e-6


TOKEN = "hf_" + "abcdefghijklmnop" * 2


@pytest.mark.parametrize(
    "override",
    [
        f"HF_TOKEN={TOKEN}",
        "WANDB_API_KEY=short",
        "track.api_key=short",
        f"track.name={TOKEN}",
        f"model.path={TOKEN}",
        f"{TOKEN}",
        "track.project=" + "0123456789abcdef" * 2 + "01234567",
        "data.path=https://me:hunter2@host/x.jsonl",
    ],
)
def test_secrets_on_the_command_line_are_refused_without_repeating_them(override: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([override])
    assert "secrets do not belong" in str(caught.value)
    assert override.partition("=")[2] not in str(caught.value) or "=" not in override
    assert TOKEN not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_secrets_that_come_in_otherwise_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "not-shaped-like-a-token")
    composed = compose(["output=runs/${oc.env:MY_SERVICE_TOKEN}"])
    part = dataclasses.replace(composed.track, name=TOKEN)
    written = to_yaml(dataclasses.replace(composed, track=part))
    assert "not-shaped-like" not in written
    assert TOKEN not in written
    assert written.count("[redacted]") == 2


def test_a_commit_is_no_secret() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert commit in to_yaml(compose([f"model.revision={commit}"]))


def test_what_is_written_reads_back() -> None:
    composed = compose(["experiment=demo", "lora.target_modules=[q_proj]"])
    assert schema.build(RunConfig, yaml.safe_load(to_yaml(composed))) == composed


def test_an_installed_wheel_finds_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "conf").mkdir()  # some other package's
    (site / "conf" / "config.yaml").write_text("other: 1\n", encoding="utf-8")
    program = (
        "from fttrain.config import run_config as config\n"
        "from fttrain.launcher import accelerate_yaml\n"
        "from fttrain.util import paths\n"
        "print(paths.conf_folder());"
        "print(config.compose(['experiment=demo']).output);"
        "file = config.compose(['launch=cpu_demo']).launch.file;"
        "print(accelerate_yaml.read_files(file)[0]['num_processes'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    folder, output, processes = done.stdout.split()
    assert re.fullmatch(r".*/site/fttrain/_files/conf", folder)
    assert (output, processes) == ("outputs/demo", "2")
