"""``fttrain measure`` on two ranks over gloo, as a user starts it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_files
import torch

from fttrain.cli import main
from fttrain.frozen.config import ModelConfig
from fttrain.frozen.source import load_config, resolve
from fttrain.model.decoder import Architecture
from fttrain.quant.config import QuantConfig
from fttrain.rig.machine import identity
from fttrain.rig.profile import COLLECTIVES, load_profile
from fttrain.rig.transports import TRANSPORTS
from fttrain.util.units import MIB


def measure(folder: Path, *settings: str) -> "subprocess.CompletedProcess[str]":
    """The command for two ranks; model, output and cache lie in ``folder`` under these names."""
    tiny_files.save(tiny.model(), folder / "model")
    usual = [
        "model=local",
        f"model.path={folder / 'model'}",
        "lora.r=4",
        "data.seq_len=128",
        "loop.micro_batch_size=2",
        f"frozen.cache_dir={folder / 'cache'}",
        "launch.processes=2",
        "rig.link_s=0.5",
        f"output={folder / 'output'}",
    ]
    return subprocess.run(
        [sys.executable, "-m", "fttrain", "measure", *usual, *settings],
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_two_ranks_leave_a_profile_and_a_report(tmp_path: Path) -> None:
    model, output, cache = tmp_path / "model", tmp_path / "output", tmp_path / "cache"
    done = measure(tmp_path, "rig.device=cpu")
    assert done.returncode == 0, done.stderr
    profile = load_profile(cache / "rig_2.json")
    assert load_profile(output / "profile.json") == profile
    assert profile.measured is not None
    assert profile.measured.machine == identity()

    assert [card.kind for card in profile.cards] == ["cpu", "cpu"]
    imported_bytes = _resident_after("import fttrain.training.train")
    rates = [profile.host.memory_bytes_per_s, profile.host.adamw_values_per_s]
    for card in profile.cards:
        rates += [card.gemm_flop_per_s, card.dequantise_bytes_per_s, card.memory_bytes_per_s]
        assert (card.to_card.pinned_bytes_per_s, card.nvlink_lanes) == (None, None)
        # To which kernels, what they pass on and the threads of a step add some
        assert card.overhead_bytes is not None
        assert 0.9 * imported_bytes < card.overhead_bytes < imported_bytes + 256 * MIB
        rates.append(card.layer_values_per_s)  # of real steps
    assert all(rate is not None and rate > 0 for rate in rates)

    (link,) = profile.links
    assert (link.transport, link.ranks, link.wrong) == ("gloo", 2, "")
    assert link.gradients_s is not None
    assert link.gradients_s > 0
    assert link.seen.startswith("TCP on ")
    assert set(link.samples) == set(COLLECTIVES)
    architecture = Architecture(load_config(resolve(ModelConfig("tiny", str(model)))))
    frozen_format = architecture.frozen_format(QuantConfig(), torch.bfloat16)
    sizes = {
        name: [sample.size_bytes for sample in samples] for name, samples in link.samples.items()
    }
    assert all(found and found == sorted(found) for found in sizes.values())
    assert frozen_format.layout.size_bytes in sizes["all_gather"]
    assert tiny.adapters(architecture)[0].flat.numel() * 4 in sizes["all_reduce"]
    assert 2 * 128 * architecture.hidden * 2 in sizes["send_recv"]  # bf16

    report = (output / "measure.md").read_text()
    assert all(f"gloo: {name}" in report for name in COLLECTIVES)
    for strategy in ("replicate", "shard", "pipeline"):
        assert re.search(rf"\| strategy={strategy} \| \d+\.\d\d\d \|", report)
    assert "![bus bandwidth over size](measure.png)" in report
    assert (output / "measure.png").read_bytes().startswith(b"\x89PNG")
    assert "1 of 1 links work" in done.stdout


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["gloo", "auto"])
def test_two_ranks_measure_cards_and_each_transport(backend: str, tmp_path: Path) -> None:
    """Over gloo they may share a card; NCCL wants one for each."""
    if backend == "auto" and torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    done = measure(tmp_path, "rig.device=cuda", f"rig.backend={backend}")
    assert done.returncode == 0, done.stdout + done.stderr
    profile = load_profile(tmp_path / "cache" / "rig_2.json")
    for card in profile.cards:
        rates = [card.gemm_flop_per_s, card.dequantise_bytes_per_s, card.memory_bytes_per_s]
        for way in (card.to_card, card.to_host):
            rates += [way.pinned_bytes_per_s, way.pageable_bytes_per_s]
            rates += [way.both_ways_bytes_per_s, way.all_cards_bytes_per_s]
        rates += [card.overhead_bytes, card.allocator_bytes]
        assert all(rate is not None and rate > 0 for rate in rates), card
    names = [link.transport for link in profile.links]
    assert names == (["gloo"] if backend == "gloo" else [own.name for own in TRANSPORTS])
    for link in profile.links:
        assert (link.wrong, link.as_asked) == ("", True), link.seen
        assert "not in" not in link.seen
        assert set(link.samples) == set(COLLECTIVES)


def _resident_after(imports: str) -> int:
    """Bytes of a fresh interpreter."""
    script = f"{imports}; print(__import__('psutil').Process().memory_info().rss)"
    command = [sys.executable, "-c", script]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_gpu_that_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["measure", "rig.device=cuda"]) == 2
    assert "rig.device=cuda: rank 0 of this machine needs GPU 0" in capsys.readouterr().err


def test_a_negative_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "rig.link_s=-1"]) == 2
    assert "rig.link_s=-1.0: a number of 0 or more seconds" in capsys.readouterr().err
