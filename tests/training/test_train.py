"""Whole runs on a tiny model: kills, resumes, signals, spikes, plain PEFT, refusals."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_files
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import WAIT_S, Fault, adapter, arguments, exit_codes, inputs, losses, two_ranks
from tiny_wandb import logs
from transformers import AutoModelForCausalLM

from fttrain.checkpoint.output_lock import lock_output
from fttrain.cli import main
from fttrain.data.config import DataConfig
from fttrain.data.dataset import prepare
from fttrain.data.loader import Loader
from fttrain.memory import ledger
from fttrain.model.head import Head
from fttrain.quant.config import QuantConfig
from fttrain.track import read_metrics
from fttrain.track.memory import read_samples
from fttrain.track.results import held_out
from fttrain.track.wandb import end_service
from fttrain.training import monitor

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, and a data set."""
    return inputs(tmp_path_factory)


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[BaseProcess]]]:
    """Starts two ranks; none outlives the test."""
    with two_ranks() as start:
        yield start


def test_killed_stopped_and_resumed_is_bit_identical(
    folder: Path, tmp_path: Path, ranks: Callable[..., list[BaseProcess]]
) -> None:
    """SIGKILL at a random moment, SIGTERM to one rank at a later step: the adapter and every loss
    are those of a run that nobody disturbed, which the launcher started.
    """
    more = (f"loop.max_steps={STEPS}", "checkpoint.every=3", "launch.processes=2")
    whole = arguments(folder, tmp_path / "whole", *more, "launch=cpu_demo")
    launched = subprocess.run(
        [sys.executable, "-m", "fttrain", *whole], capture_output=True, text=True, timeout=WAIT_S
    )
    assert launched.returncode == 0, launched.stderr
    assert f"step {STEPS}/{STEPS}" in launched.stdout + launched.stderr
    output = tmp_path / "disturbed"
    disturbed = arguments(folder, output, *more)
    kill = Fault(0, random.randrange(4, 9), signal.SIGKILL, random.uniform(0.001, 0.1))
    killed = ranks(disturbed, kill)
    killed[0].join(WAIT_S)
    killed[1].kill()  # as the launcher does
    assert exit_codes(killed)[0] == -signal.SIGKILL
    assert not (output / "adapter").exists()
    stop = Fault(1, random.randrange(14, 20), signal.SIGTERM)
    assert exit_codes(ranks(disturbed, stop)) == [143, 143]
    assert max(losses(output)) == stop.step + 1  # the step that was under way is finished
    assert (output / "checkpoints" / f"step_{stop.step + 1:08d}").is_dir()
    assert exit_codes(ranks(disturbed)) == [0, 0]
    assert losses(output) == losses(tmp_path / "whole"), (kill, stop)
    ours, expected = adapter(output), adapter(tmp_path / "whole")
    assert all(torch.equal(ours[name], expected[name]) for name in expected), (kill, stop)
    assert any(bool(tensor.any()) for name, tensor in ours.items() if "lora_B" in name)
    samples = read_samples(output / "memory.jsonl")
    assert [(step, len(ranks)) for step, ranks in samples] == [(10, 2), (20, 2), (STEPS, 2)]
    last = f"checkpoints/step_{STEPS:08d}"
    for file in ("optimizer.safetensors", "state.json"):  # moments; the spike guard's memory
        assert (output / last / file).read_bytes() == (
            tmp_path / "whole" / last / file
        ).read_bytes()


def run(folder: Path, output: Path, *more: str) -> int:
    """In this process, one rank."""
    return main(arguments(folder, output, *more))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was said."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("fttrain: error:")]) == 1
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps."""
    output = tmp_path_factory.mktemp("finished") / "run"
    more = ("loop.eval_every=4", "checkpoint.every=2", "track.memory_every=4", "track=tensorboard")
    assert run(folder, output, "loop.max_steps=6", *more) == 0
    return output


def test_what_a_run_leaves(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "evaluation.json", "adapter", "report.md"} <= names
    (rank,) = json.loads((finished / "memory.json").read_text())["ranks"]
    parts = {use["part"]: use["host_bytes"] for use in rank}
    assert min(parts[name] for name in ("frozen layers", "adapters", "activations")) > 0
    samples = read_samples(finished / "memory.jsonl")
    assert [step for step, _ in samples] == [4, 6]  # and the last one, so that no peak is missed
    for _, (own,) in samples:
        assert 0 < own["host_resident_bytes"] <= own["host_peak_bytes"]
    report = (finished / "report.md").read_text()
    assert "## Memory in step 1, GiB" in report
    assert "![memory](plots/memory.png)" in report
    assert (finished / "plots" / "memory.png").is_file()
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000006",
    ]
    figures = json.loads((finished / "evaluation.json").read_text())
    assert [entry["step"] for entry in figures["history"]] == [0, 4, 6]
    assert figures["tuned"]["nll"] < figures["base"]["nll"]
    assert figures["samples"][0]["prompt"].startswith("What is")
    assert list(losses(finished)) == [1, 2, 3, 4, 5, 6]


def test_what_tensorboard_shows_of_it(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx(losses(finished))
    figures = json.loads((finished / "evaluation.json").read_text())
    nll = {entry["step"]: entry["nll"] for entry in figures["history"]}
    assert {e.step: e.value for e in events.Scalars("holdout_nll")} == pytest.approx(nll)
    samples = events.Tensors("samples/text_summary")
    assert [event.step for event in samples] == [0, 6], "before, and with the answers after"
    assert figures["samples"][0]["prompt"].encode() in samples[-1].tensor_proto.string_val[0]
    assert {"plots/loss", "plots/throughput"} <= set(events.Tags()["images"])


def test_a_card_that_throttles_is_told_once_and_written_down(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the driver would say it of a card that nobody here has."""
    hot = {"throttle_reasons": 64.0, "temperature_c": 97.0}
    monkeypatch.setattr(monitor, "gather_samples", lambda group: [hot])
    assert run(folder, tmp_path / "run", "loop.max_steps=4", "track.memory_every=1") == 0
    told = re.findall(r"warning: step (\d+): the card of rank 0 (.*)", capsys.readouterr().err)
    assert told == [("1", "throttles (97 °C): it is far too hot")]
    lines = (tmp_path / "run" / "memory.jsonl").read_text().splitlines()
    assert [json.loads(line)["cards"] for line in lines] == [[hot]] * 4


def test_plain_peft_gives_the_same_held_out_loss(folder: Path, finished: Path) -> None:
    """The saved adapter over transformers' model with the same dequantised weights."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(tiny.dequantised(base, QuantConfig()), finished / "adapter")
    rows = prepare(
        DataConfig(
            kind="file",
            path=str(folder / "data.jsonl"),
            seq_len=96,
            cache_dir=str(folder / "cache"),
        ),
        tiny_files.tokenizer(),
        "model/@",
    ).holdout
    documents = [document for i in range(len(rows)) for document in rows[i]]
    with torch.no_grad():
        loss = tiny.reference_loss(model.eval(), documents)
    tuned = json.loads((finished / "evaluation.json").read_text())["tuned"]
    assert tuned["nll"] == pytest.approx(loss.item() / tuned["tokens"], rel=1e-5)


def test_evaluating_a_run_gives_the_figures_of_its_end(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    at_the_end = json.loads((output / "evaluation.json").read_text())
    (output / "evaluation.json").unlink()
    capsys.readouterr()
    assert main(["evaluate", f"output={output}"]) == 0
    estimates = re.findall(r"answering 1 prompt\(s\): .*, at most \d+ s\n", capsys.readouterr().out)
    assert len(estimates) == 2  # of the base and of the tuned model
    again = json.loads((output / "evaluation.json").read_text())
    for part in ("base", "tuned", "samples"):
        assert again[part] == at_the_end[part]
    assert main(["evaluate", f"output={output}", "loop.samples=0"]) == 0  # the rest as it was
    again = json.loads((output / "evaluation.json").read_text())
    assert (again["samples"], again["tuned"]) == ([], at_the_end["tuned"])
    assert main(["evaluate", f"output={output}", "data.holdout=0.5"]) == 0  # of the run's data
    again = json.loads((output / "evaluation.json").read_text())
    assert again["tuned"]["tokens"] > at_the_end["tuned"]["tokens"]
    assert main(["evaluate", f"output={tmp_path / 'nowhere'}"]) != 0
    assert "no run is there" in error_of(capsys)


def test_a_finished_run_that_is_started_again_changes_nothing(
    folder: Path, finished: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    assert run(folder, again, "loop.max_steps=6", "loop.eval_every=4", "checkpoint.every=2") == 0
    assert losses(again) == losses(finished)
    assert all(torch.equal(t, adapter(finished)[n]) for n, t in adapter(again).items())


def test_a_finished_run_that_goes_on_and_is_stopped_has_not_ended(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more steps: what was found at the earlier end stays a point at that step, no more."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = json.loads((output / "evaluation.json").read_text())
    monkeypatch.setattr(Loader, "next_step", Loader.next_step)  # what the fault does is undone
    Fault(0, 6, signal.SIGTERM).inject()
    assert run(folder, output, "loop.max_steps=9") == 128 + signal.SIGTERM
    assert max(losses(output)) == 7
    figures = json.loads((output / "evaluation.json").read_text())
    assert (figures["base"], figures["history"]) == (before["base"], before["history"])
    assert figures["tuned"] is None
    assert [sample["after"] for sample in figures["samples"]] == [""]
    points = held_out(read_metrics(output / "metrics.jsonl"), figures)
    assert points == [(entry["step"], entry["nll"]) for entry in before["history"]]
    report = (output / "report.md").read_text()
    assert "Not finished: the last step so far is 7; there is no verdict yet." in report


def test_a_second_run_into_the_same_folder_is_refused(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(folder, finished, "resume=none") != 0
    assert "already holds a run" in error_of(capsys)
    with lock_output(finished, "auto"):
        assert run(folder, finished) != 0
    assert "is writing there" in error_of(capsys)
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loop.seed=7", "loop.seed was 42 when it was saved and is 7 now"),
        ("loop.micro_batch_size=3", "rows per step was 4 when it was saved and is 6 now"),
        ("data.seq_len=80", "data fingerprint was"),
        ("lora.use_dora=true", "lora.use_dora was False when it was saved and is True now"),
        ("lm_head=quantized", "head in 4 bits was False when it was saved and is True now"),
        ("lora.r=5", "lora.r was 4 when it was saved and is 5 now"),
        ("lora.lora_alpha=5", "lora.lora_alpha was 32.0 when it was saved and is 5.0 now"),
        ("lora.lora_dropout=0.5", "lora.lora_dropout was 0.1 when it was saved and is 0.5 now"),
        ("quant=fp4", "quant.kind was nf4 when it was saved and is fp4 now"),
        ("model.name=other", "model.name was local when it was saved and is other now"),
        ("lora.target_modules=[q_proj]", "lora.target_modules was all-linear when it was saved"),
    ],
)
def test_a_resume_that_would_not_go_on_is_refused(
    change: str, message: str, folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its config.yaml still says what was trained."""
    before = (finished / "config.yaml").read_bytes()
    assert run(folder, finished, change) != 0
    assert message in error_of(capsys)
    assert (finished / "config.yaml").read_bytes() == before


def test_data_edited_between_save_and_resume_is_refused(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, data = tmp_path / "run", tmp_path / "data.jsonl"
    shutil.copytree(finished, output)
    text = (folder / "data.jsonl").read_text()
    data.write_text(text.replace("It is 5", "It is 6", 1))
    assert run(folder, output, f"data.path={data}") != 0
    assert "data fingerprint was" in error_of(capsys)
    data.write_text(text)  # the same lines again, in another place: the same data
    assert run(folder, output, f"data.path={data}", "loop.max_steps=6") == 0


def test_data_that_does_not_fill_a_step_is_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over all ranks: two ask for twice the rows. A dry run takes what there is."""
    assert run(folder, tmp_path / "run", "loop.gradient_accumulation_steps=50") == 2
    assert "one optimizer step takes 100" in error_of(capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")  # refused before the ranks meet
    assert run(folder, tmp_path / "run", "loop.gradient_accumulation_steps=50") == 2
    assert "one optimizer step takes 200" in error_of(capsys)
    monkeypatch.delenv("WORLD_SIZE")
    assert not (tmp_path / "run").exists()
    assert run(folder, tmp_path / "run", "loop.gradient_accumulation_steps=50", "dry_run=4") == 0


def test_a_loss_that_rises_stops_the_run_with_advice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At this limit the usual ups and downs of a small model are a spike."""
    jumpy = ("optim.lr=1", "optim.lr_schedule=constant", "loop.spike_rise=0.01")
    tracked = ("loop.max_steps=40", "track=wandb", "track.mode=offline")
    assert run(folder, tmp_path / "stop", *jumpy, *tracked) == 3
    end_service()
    assert "lower optim.lr" in error_of(capsys)
    assert [log.exit_code for log in logs(tmp_path / "stop")] == [3], "shown as failed"
    assert not (tmp_path / "stop" / "adapter").exists()
    stopped = len(losses(tmp_path / "stop")) + 1  # the step whose loss was refused
    skip = (*jumpy, "loop.max_steps=40", "loop.spike_policy=skip")
    assert run(folder, tmp_path / "skip", *skip) in (0, 3)  # 3: ten in a row were refused
    lines = read_metrics(tmp_path / "skip" / "metrics.jsonl")
    assert [line["updated"] for line in lines][:stopped] == [True] * (stopped - 1) + [False]


def poisoned(folder: Path, place: Path) -> Path:
    """The same base with a NaN in it."""
    shutil.copytree(folder / "model", place)
    tensors = load_file(place / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("policy", ["stop", "skip", "ignore"])
def test_nan_is_never_trained(
    policy: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = poisoned(folder, tmp_path / "model")
    code = run(
        folder,
        tmp_path / "run",
        f"model.path={model}",
        f"loop.spike_policy={policy}",
        "loop.max_steps=12",
        "loop.samples=0",
    )
    captured = capsys.readouterr()
    assert "nan" in captured.out + captured.err
    if policy == "ignore":
        assert code == 0
        lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert not any(line["updated"] for line in lines if "updated" in line)
        saved = adapter(tmp_path / "run")
        assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
        assert not any(bool(tensor.any()) for n, tensor in saved.items() if "lora_B" in n)
    else:
        assert code == 3
        assert not (tmp_path / "run" / "adapter").exists()


def edit_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gemma", "architecture 'gemma' is not supported; there are llama"),
        ("truncated", "not a whole safetensors file"),
        ("missing", "tensor model.layers.1.mlp.up_proj.weight is missing"),
        ("shape", "shape (128, 64) in the checkpoint, (96, 64) expected"),
        ("tokens", "tokenizer has 301 tokens, the frozen embedding 300"),
        ("gptq", "quantised with 'gptq'; only 4-bit bitsandbytes"),
        ("index", "../x.safetensors is not a file in this folder"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(
    fault: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    weights = model / "model.safetensors"
    if fault == "gemma":
        edit_config(model, model_type="gemma")
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "missing":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif fault == "shape":
        edit_config(model, intermediate_size=96)
    elif fault == "tokens":
        tiny_files.tokenizer(extra=300 - 259 + 1).save_pretrained(model)
    elif fault == "gptq":
        edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    else:
        index = {"weight_map": {"model.norm.weight": "../x.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(folder, tmp_path / "run", f"model.path={model}", "loop.max_steps=1") != 0
    assert message in error_of(capsys)


def test_a_host_that_is_too_small_is_refused_before_anything_is_loaded(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger, "available_host_bytes", lambda: 1000)
    cache = tmp_path / "cache"
    assert run(folder, tmp_path / "run", "strategy=stream", f"frozen.cache_dir={cache}") == 2
    error = error_of(capsys)
    assert re.search(r"host memory: .* are needed \(.*frozen layers.*\), 0\.00 GiB are", error)
    assert not list(cache.rglob("*.bin"))


def test_memory_that_runs_out_in_a_step_is_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 ...")

    monkeypatch.setattr(Head, "loss_and_gradient", full)
    assert run(folder, tmp_path / "run") == 2
    assert "rank 0 ran out of memory on cpu (Tried to allocate 1.00 GiB)" in error_of(capsys)
