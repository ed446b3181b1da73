"""``accelerate launch`` with a launch file of type DEEPSPEED: two ranks, all weights, a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_files
import tiny_run
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fttrain.launcher.accelerate_yaml import read_env
from fttrain.util.paths import launch_folder

LAUNCH = launch_folder() / "deepspeed_zero3.yaml"


@pytest.mark.deepspeed
def test_accelerate_starts_two_ranks_that_train_all_weights(tmp_path: Path) -> None:
    model = tiny.model("llama_tied", num_hidden_layers=1)
    tiny_files.save(model, tmp_path / "model")
    tiny_files.write_data(tmp_path / "data.jsonl")
    output = tmp_path / "run"
    more = ("strategy=deepspeed", "quant=none", "lora=none", "lora.r=0", "lora.lora_dropout=0")
    arguments = tiny_run.arguments(tmp_path, output, *more, "loop.max_steps=2", "loop.samples=0")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH)]
    environment = {**read_env(LAUNCH.with_suffix(".env")), **os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "-m", "fttrain", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=tiny_run.WAIT_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "strategy=deepspeed on 2 rank(s)" in done.stdout
    assert "DeepSpeed" not in done.stderr, "it is not quiet"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["updated"] and line["sync_bytes"] and line["gather_bytes"] for line in steps)
    tuned = AutoModelForCausalLM.from_pretrained(output / "model")
    weights = load_file(output / "checkpoints" / "step_00000002" / "weights.safetensors")
    base = dict(model.named_parameters())
    for name, tensor in tuned.named_parameters():
        assert torch.equal(tensor, weights[name]), f"{name} is not what the snapshot holds"
        assert not torch.equal(tensor, base[name]), f"{name} has not trained"
    assert weights.keys() == base.keys()
